"""RECIPE: the formula of a merged tensor, one formula a file."""
