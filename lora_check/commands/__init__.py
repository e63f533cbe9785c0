"""COMMAND: one sub-command a file."""
