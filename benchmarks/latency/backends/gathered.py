"""The factors of each sequence gathered by index, and two batched products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from benchmarks.latency.backends._sequences import Shared, by_sequence, like
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Gathered(Shared):
    """y_i = x_i W^T + s (x_i A_c(i)^T) B_c(i)^T for each sequence i, with c (batch,) on the device."""

    chosen: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("chosen", torch.tensor(self.names, device=site.a.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, K) or (batch * L, K) -> the same with N."""
        rows = by_sequence(x, len(self.names))
        a, b = self.a.index_select(0, self.chosen), self.b.index_select(0, self.chosen)
        y = functional.linear(rows, self.weight, self.bias)
        y.baddbmm_(torch.bmm(rows, a.mT), b.mT, alpha=self.s)
        return like(y, x)


BACKEND = Backend(
    name="gathered",
    about="`A` and `B` of each sequence gathered by index, `bmm` and `baddbmm_`: four more kernels for any n",
    place=72,
    build=Gathered,
    one=False,
    many=True,
    traffic="gathered",
)
