"""A CPU node's large matmuls and whole layers, done by the C kernels of csrc/kernels."""
