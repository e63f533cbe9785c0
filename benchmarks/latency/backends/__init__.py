"""BACKEND: one way to compute the forward of an adapted module a file."""
