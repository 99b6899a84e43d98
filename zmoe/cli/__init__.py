"""The commands zmoe-run, zmoe-node, zmoe-plan and zmoe-prestack."""
