"""What zmoe knows of each model family.

table      one adapter per class of MoE block, grouped by kind of router: a new family's entry
routers    how the blocks route
outputs    what the blocks compute beside and after their routed experts
decoders   the families whose whole layers run in C
dbrx       DBRX's model, with its experts stacked
sites      the MoE blocks in a model, and the model's class by its config
"""
