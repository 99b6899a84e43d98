"""How fast a model runs on a cluster, worked out: the performance model.

Pure functions and frozen dataclasses; seconds, bytes and operations (a multiply
and an add are two) throughout. docs/performance-model.md has the equations.

    shape         what a model is made of, in parameters, bytes and operations
    model_config  the same from its config.json
    hardware      a machine
    links         a network, and what messages cost on it
    profile       a measured machine and link, as a file
    measured      what was measured, as the equations take it
    routing       which experts a step selects, and how they fall on the nodes
    owners        which node may compute which expert
    places        where experts lie, as the equations see it
    busiest       the node that the others wait for, under each policy
    cost          one step's time, in five terms
    memory        what each node must hold
    units         numbers as people read them
"""
