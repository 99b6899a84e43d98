"""One MoE layer over several nodes: routing, local experts, exchange of partial outputs."""
