"""What this process may use of its machine: cores, NUMA nodes, and the limits of containers.

Everything is read from system files under a root folder, which tests replace.
"""
