"""Many sequences in one step: plans, blocks, the scheduler. Pure functions and data."""
