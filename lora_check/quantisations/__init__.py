"""QUANTISATION: how a scheme keeps a tensor as codes, one scheme a file."""
