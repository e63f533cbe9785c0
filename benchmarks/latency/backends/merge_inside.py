"""Merging inside each forward: W' is made, used once and overwritten by the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from benchmarks.latency.backends._adapted import Adapted
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class MergeInside(Adapted):
    """W' = W + s B A into a buffer that all calls share, rounded once; y = x W'^T."""

    merged: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("merged", torch.empty_like(self.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        torch.addmm(self.weight, self.b, self.a, alpha=self.s, out=self.merged)
        return functional.linear(x, self.merged, self.bias)


BACKEND = Backend(
    name="merge_inside",
    about="merges in every forward: `addmm` of `W`, `B` and `A` into a buffer, then one product",
    place=50,
    build=MergeInside,
    traffic="merge",
)
