"""Checkpoints that lie elsewhere: names, sizes and byte ranges of what a URL leads to; no weights are kept on disk."""
