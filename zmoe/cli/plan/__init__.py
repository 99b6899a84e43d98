"""zmoe-plan: the command, its report, and its table of models."""
