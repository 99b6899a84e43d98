"""A CPU node's large products, done by the C kernels of csrc/kernels instead of MLX."""
