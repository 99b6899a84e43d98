"""zmoe-plan: the command, what it advises and reports, and its table of models."""
