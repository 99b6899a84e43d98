"""What a cluster would do, worked out: the performance model behind zmoe-plan.

Pure functions and frozen dataclasses; seconds, bytes and operations (a multiply
and an add are two) throughout. docs/performance-model.md has the equations.

    shape      what a model is made of, in parameters, bytes and operations
    models     well-known models          config     a model from its config.json
    hardware   well-known machines        links      well-known networks
    profile    a measured machine and link, as a file
    lookup     a name in one of these tables, or what to say of it
    routing    which experts a step selects, and how they fall on the nodes
    owners     which node may compute which expert
    busiest    the node that the others wait for, under each policy
    placement  ways to spread experts over nodes
    exchange   what the nodes' messages cost
    cost       one step's time, in five terms
    memory     what each node must hold
    plan       predictions over numbers of nodes
    advice     what to conclude from them
"""
