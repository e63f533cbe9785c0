"""peft_model: the adapter inside a live PeftModel, under the names that save_pretrained would give it.

PEFT marks every tensor of an adapter with the adapter's name; the trained biases of bias="all" and "lora_only" are the
base's own. peft is not imported: a module with a `peft_config` is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lora_check.errors import WrongInputError
from lora_check.formats import _memory
from lora_check.types import Format


def recognises(source: Any) -> bool:
    """A module with a mapping of adapter configurations."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module) and isinstance(_configs(source), Mapping)


def open_module(source: Any) -> _memory.MemoryCheckpoint:
    """List the tensors of the active adapter.

    raises   WrongInputError: several adapters are active, or none
    """
    active = getattr(source, "active_adapters", None) or [getattr(source, "active_adapter", None)]
    location = f"<{type(source).__name__} in memory>"
    if len(active) != 1 or active[0] not in _configs(source):
        names = ", ".join(map(str, active))
        raise WrongInputError(
            f"{location} has no single active adapter ({names})", hint="activate one with set_adapter"
        )
    config = _plain(_configs(source)[active[0]].to_dict())
    biases = config.get("bias") in ("all", "lora_only")
    state = source.state_dict()
    tensors = {
        _saved_name(name, active[0]): value for name, value in state.items() if _belongs(name, active[0], biases)
    }
    return _memory.in_memory(location, tensors, {}, adapter_config=config)


def _configs(source: Any) -> Any:
    return getattr(source, "peft_config", None)


def _belongs(name: str, adapter: str, biases: bool) -> bool:
    return adapter in name.split(".") or (biases and name.endswith(".bias"))


def _saved_name(name: str, adapter: str) -> str:
    plain = name.replace(f".modules_to_save.{adapter}.", ".")
    return ".".join(segment for segment in plain.split(".") if segment != adapter)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would have it: sets are sorted lists, enumerations are their values."""
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.items()
    }


FORMAT = Format(name="peft_model", recognises=recognises, open=open_module, roles=("adapter",))
