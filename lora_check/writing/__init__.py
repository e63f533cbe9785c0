"""What `merge` writes: the layout of its files, the bytes of their tensors, what lies beside them, and where."""
