"""Reading a checkpoint: config, headers, byte ranges of tensors, prestacked manifests."""
