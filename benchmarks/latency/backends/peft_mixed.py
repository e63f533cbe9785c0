"""PEFT's inference with several adapters in one batch: `adapter_names`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.latency.backends._peft import lacking, peft_layer
from benchmarks.latency.backends._sequences import by_sequence, chosen, like
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Mixed(nn.Module):
    """PEFT's layer with n adapters in float32, as it loads them; `names` says which sequence has which."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.layer = peft_layer(site, torch.float32)
        self.names = [str(i) for i in chosen(site)]

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, K) or (batch * L, K) -> the same with N."""
        return like(self.layer(by_sequence(x, len(self.names)), adapter_names=self.names), x)


BACKEND = Backend(
    name="peft_mixed",
    about="PEFT's mixed batch (`adapter_names`), fp32 adapters: one adapter after the other, by lists of indices",
    place=70,
    build=Mixed,
    adapter="float32",
    one=False,
    many=True,
    missing=lacking,
    traffic="peft",
)
