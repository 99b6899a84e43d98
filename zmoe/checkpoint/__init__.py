"""Reading a checkpoint.

hub          from a name to a folder on this machine
folder       config.json, and every tensor of a folder
safetensors  one file's header
select       the byte ranges that a node needs, and reading them
fingerprint  whether two nodes hold the same checkpoint
manifest     what a prestacked store holds
verify       whether a store's files are those of its manifest
"""
