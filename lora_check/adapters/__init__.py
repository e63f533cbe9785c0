"""adapter_config.json and the tensors beside it -> Adapter; the scale of each module."""
