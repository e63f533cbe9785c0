"""The forms of an inference: one file with one RENDERER each, and the names of those of a report."""
