"""FAULT: a mistake with a forward model, one mistake a file; the docstring is its page."""
