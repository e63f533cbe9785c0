"""RENDERER: Report -> text of one kind, one kind a file."""
