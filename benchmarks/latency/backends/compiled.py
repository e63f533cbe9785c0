"""What a user of PEFT would try first: torch.compile of PEFT's layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.latency.backends._compile import compiled, no_compiler
from benchmarks.latency.backends._peft import lacking, peft_layer
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.latency.nouns import Place, Site


def build(site: Site) -> nn.Module:
    """The layer of `peft_float32`, compiled as one graph."""
    module: nn.Module = compiled(peft_layer(site, torch.float32))
    return module


def missing(place: Place) -> str:
    """PEFT, or what torch.compile needs."""
    return lacking(place) or no_compiler(place)


BACKEND = Backend(
    name="compiled",
    about="`torch.compile` of PEFT's layer as it loads by default, with fp32 adapters",
    place=30,
    build=build,
    adapter="float32",
    missing=missing,
    traffic="compiled",
)
