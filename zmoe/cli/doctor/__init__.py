"""zmoe-doctor: what a machine is, and whether zmoe computes on it as mlx-lm does."""
