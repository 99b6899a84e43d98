"""Who owns which experts: pure functions, and the files that steer them.

spread     experts dealt out to nodes, as plain numbers
build      the same as a Placement, for every layer of a model
file       a placement as a JSON file
usage      how often each expert was chosen, as a JSON file
"""
