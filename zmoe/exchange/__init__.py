"""The all-reduce of one layer's partial sums among all nodes."""
