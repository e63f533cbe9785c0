"""The activation functions that PEANuT may be told to use, by their names in transformers."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import TYPE_CHECKING

from lora_check.types import Numbers

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = frozenset(
    {
        "gelu",
        "gelu_new",
        "gelu_pytorch_tanh",
        "leaky_relu",
        "linear",
        "quick_gelu",
        "relu",
        "relu6",
        "silu",
        "swish",
        "tanh",
    }
)
"""Those whose error is known; the others of transformers' ACT2FN are rare, or have parameters that no file holds."""


def activated(x: Numbers, name: str) -> Numbers:
    """The function of that name, of each element; computed as transformers does, so that its bits are the same."""
    import torch
    from torch.nn import functional

    from lora_check.functions import gated, mapped, moved

    if name == "linear":
        return x
    if name == "relu":
        return moved(x, torch.relu)
    flat: dict[str, Callable[[Tensor], Tensor]] = {
        "leaky_relu": functional.leaky_relu,
        "relu6": functional.relu6,
        "tanh": torch.tanh,
    }
    if name in flat:
        return mapped(x, flat[name], torch.ones_like)
    gates: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": functional.gelu,
        "gelu_new": _gelu_new,
        "gelu_pytorch_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
        "silu": functional.silu,
        "swish": functional.silu,
    }
    return gated(x, gates[name])


def _gelu_new(x: Tensor) -> Tensor:
    import torch

    inner = sqrt(2.0 / pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))
