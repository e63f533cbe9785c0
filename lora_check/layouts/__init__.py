"""LAYOUT: how a tool renames, ties, fuses or splits base tensors, one way a file."""
