"""The forms of a forward: one file with one RENDERER each, and the names of those of a report."""
