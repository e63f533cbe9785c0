"""PEFT's layer as PEFT loads it: A and B in float32, whatever the dtype of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.latency.backends._peft import lacking, peft_layer
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.latency.nouns import Site


def build(site: Site) -> nn.Module:
    """`autocast_adapter_dtype=True`, the default: the input is cast up, both products and the sum run in float32."""
    return peft_layer(site, torch.float32)


BACKEND = Backend(
    name="peft_float32",
    about="PEFT's layer as it loads by default, with fp32 adapters: cast up, two products, scale, add, cast back",
    place=20,
    build=build,
    adapter="float32",
    missing=lacking,
    traffic="peft",
)
