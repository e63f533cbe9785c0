"""Two checkpoints, no adapter: what changed from A to B, by how much, and whether it was expected."""
