"""FORMAT: how named tensors lie on disk or in memory, one way a file."""
