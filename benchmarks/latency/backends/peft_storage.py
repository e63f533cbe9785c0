"""PEFT's layer with A and B in the dtype of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.latency.backends._peft import lacking, peft_layer
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.latency.nouns import Site


def build(site: Site) -> nn.Module:
    """`autocast_adapter_dtype=False`."""
    return peft_layer(site, site.base.weight.dtype)


BACKEND = Backend(
    name="peft_storage",
    about="PEFT's layer with `autocast_adapter_dtype=False`: adapters in the dtype of the base, no casts",
    place=21,
    build=build,
    missing=lacking,
    traffic="eager",
)
