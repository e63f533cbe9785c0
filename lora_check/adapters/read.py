"""An opened checkpoint and the adapter_config.json beside it -> Adapter."""

from __future__ import annotations

from dataclasses import replace

from lora_check import registry
from lora_check.errors import AdapterConfigError
from lora_check.locations import read_adapter_config
from lora_check.types import Adapter, Checkpoint


def read_adapter(checkpoint: Checkpoint, weight: float = 1.0) -> Adapter:
    """Parse an opened adapter with the first dialect that recognises it.

    weight   a factor on its scale
    raises   AdapterConfigError: no configuration, an impossible one, or names of no known dialect
    """
    raw = read_adapter_config(checkpoint)
    for dialect in registry.load("dialects").values():
        if dialect.recognises(raw, tuple(checkpoint.metas())):
            adapter: Adapter = dialect.read(raw, checkpoint)
            return replace(adapter, weight=weight)
    known = ", ".join(registry.load("dialects"))
    raise AdapterConfigError(
        f"the tensor names and adapter_config.json of {checkpoint.location} are of no known adapter dialect",
        hint=f"known dialects: {known}",
    )
