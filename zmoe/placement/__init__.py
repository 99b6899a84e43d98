"""Who owns which experts: pure functions, and the files that steer them.

types       a placement, and a checkpoint whose experts are placed
spread      experts dealt out to nodes, as plain numbers
build       the ways to place a model's experts, as placements
check       whether a placement is one of a model
file        a placement as a JSON file
usage       how often each expert was chosen, as a JSON file
placed      a placement as the performance model sees it
predict     predictions over numbers of nodes
estimate    what the nodes of a run offer, as the performance model takes it
remedy      what would make a model fit
choose      the placement of a run: asked for, or the fastest by prediction
assignment  which owner computes an expert in a step
pairs       a step's tokens and the experts that they chose, sorted by expert
"""
