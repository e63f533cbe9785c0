"""n merged copies of the weights, each serving the sequences of its own adapter: the yardstick of a mixed batch.

Whoever holds n merged models sends each its own sequences, side by side. So the products here run on neighbouring rows
and write where they belong; only a batch that does not come sorted by adapter is sorted before and put back after.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.latency.backends._merging import merged_weight
from benchmarks.latency.backends._sequences import by_sequence, chosen, like
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Copies(nn.Module):
    """y_i = x_i W'_c(i)^T, and the bias of the base, for each sequence i; `weights` (n, N, K).

    order    the sequences, sorted by adapter, and `back` the way back; neither where they come so
    spans    for each adapter, its first sequence in that order and the one after its last
    """

    weights: Tensor
    bias: Tensor | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        adapters, names, bias = len(site.a), chosen(site), site.base.bias
        self.register_buffer(
            "weights", torch.stack([merged_weight(site, i) for i in range(adapters)]), persistent=False
        )
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.batch, self.sorted = len(names), names == sorted(names)
        self.spans = tuple(pairwise(accumulate((names.count(i) for i in range(adapters)), initial=0)))
        order = torch.tensor(names, device=site.a.device).argsort(stable=True)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, K) or (batch * L, K) -> the same with N."""
        given = by_sequence(x, self.batch)
        rows = given if self.sorted else given.index_select(0, self.order)
        y = rows.new_empty(*rows.shape[:-1], self.weights.shape[1])
        for weight, (first, end) in zip(self.weights, self.spans, strict=True):
            if first < end:
                product(rows[first:end].flatten(0, 1), weight.T, self.bias, y[first:end].flatten(0, 1))
        return like(y if self.sorted else y.index_select(0, self.back), x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """x (m, K) by weight (K, N), and the bias, written to where it belongs."""
    if bias is None:
        torch.mm(x, weight, out=into)
    else:
        torch.addmm(bias, x, weight, out=into)


BACKEND = Backend(
    name="merged_copies",
    about="n merged copies of the weights, each serving the sequences of its own adapter: n reads of `W`",
    place=1,
    build=Copies,
    one=False,
    many=True,
    merged=True,
    traffic="merged",
)
