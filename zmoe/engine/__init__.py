"""Plans on one node, and the leader's loop that turns their logits into text."""
