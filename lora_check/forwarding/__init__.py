"""What base, base + adapters and merged compute: logits, generations, and the first module that departs."""
