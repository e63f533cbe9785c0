"""module: tensors in memory, of an nn.Module or of a mapping of names to tensors.

Of the names of a module that share one tensor (a tied head) one is kept, as save_pretrained does. A mapping
is taken as it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_check.errors import WrongInputError
from lora_check.formats import _memory
from lora_check.types import Format

if TYPE_CHECKING:
    from torch import Tensor, nn


def recognises(source: Any) -> bool:
    """A module, or a mapping of names to tensors."""
    torch = sys.modules.get("torch")
    return isinstance(source, Mapping) or (torch is not None and isinstance(source, torch.nn.Module))


def open_object(source: nn.Module | Mapping[str, Any]) -> _memory.MemoryCheckpoint:
    """List the tensors of a module or a state dict.

    raises   WrongInputError: a value that is no tensor, or no tensors at all
    """
    from torch import Tensor, nn

    module = isinstance(source, nn.Module)
    location = f"<{type(source).__name__} in memory>" if module else "<state dict in memory>"
    tensors = _untied(source) if isinstance(source, nn.Module) else dict(source)
    if not tensors:
        raise WrongInputError(f"{location} holds no tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            message = f"{location} holds a {type(tensor).__name__} under {name!r}, which is no named tensor"
            raise WrongInputError(message, hint="give a mapping of names to tensors")
    return _memory.in_memory(location, tensors, _config(source) if module else {})


def _config(module: Any) -> Mapping[str, Any]:
    """What config.json would say; a module without a config says nothing."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else {}
    return config if isinstance(config, dict) else {}


def _untied(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with one name for each tensor: the first that the module does not declare as tied."""
    from torch import Tensor

    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(_place(name, tensor), []).append(name)
    declared = [re.compile(pattern) for pattern in _tied_patterns(module)]
    kept = {_kept(names, declared) for names in groups.values()}
    return {name: tensor for name, tensor in state.items() if name in kept}


def _place(name: str, tensor: Tensor) -> object:
    """What two names of one tensor have in common; a tensor without data shares nothing."""
    if tensor.is_meta or str(tensor.layout) != "torch.strided" or tensor.numel() == 0:
        return name
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _kept(names: list[str], declared: list[re.Pattern[str]]) -> str:
    free = [name for name in names if not any(pattern.search(name) for pattern in declared)]
    return free[0] if free else max(names)


def _tied_patterns(module: nn.Module) -> Iterator[str]:
    """Every `_tied_weights_keys` of the module and those inside it: a list, or (transformers 5) a mapping."""
    for prefix, inner in module.named_modules():
        for key in getattr(inner, "_tied_weights_keys", None) or ():
            yield f"{prefix}.{key}" if prefix else str(key)


FORMAT = Format(name="module", recognises=recognises, open=open_object)
