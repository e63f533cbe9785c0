"""The forms of an inspection: one file with one RENDERER each, and the names of those of a report."""
