"""One adapter after the other: its sequences picked out, two products, and the result added where they stood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from benchmarks.latency.backends._sequences import Shared, by_sequence, like
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Looped(Shared):
    """y = x W^T; y_i += s (x_i A_j^T) B_j^T for all sequences i of adapter j, and so for each j that has any.

    places    these adapters and their sequences: known to the host before the forward begins
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        device = site.a.device
        self.places = tuple((j, indices(self.names, j).to(device)) for j in sorted(set(self.names)))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, K) or (batch * L, K) -> the same with N."""
        rows = by_sequence(x, len(self.names))
        y = functional.linear(rows, self.weight, self.bias)
        for adapter, where in self.places:
            shrunk = functional.linear(rows.index_select(0, where), self.a[adapter])
            y.index_add_(0, where, functional.linear(shrunk, self.b[adapter]), alpha=self.s)
        return like(y, x)


def indices(names: list[int], adapter: int) -> Tensor:
    """The sequences of one adapter."""
    return torch.tensor([i for i, name in enumerate(names) if name == adapter])


BACKEND = Backend(
    name="looped",
    about="for each adapter `index_select`, two products and `index_add_`: four more kernels for each of n",
    place=71,
    build=Looped,
    one=False,
    many=True,
    traffic="looped",
)
