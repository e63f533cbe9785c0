"""COMBINATION: how PEFT's add_weighted_adapter makes one adapter of several, one kind a file."""
