"""The forms of a difference: one file with one RENDERER each, and the names of those of a report."""
