"""zmoe-plan: the command, its advice and report, and the well-known models, machines and links."""
