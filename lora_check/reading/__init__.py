"""How bytes get from a disk into the check: read ahead or plainly, unchanged, and how fast."""
