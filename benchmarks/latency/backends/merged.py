"""The adapter is in the weights: the yardstick."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from benchmarks.latency.backends._merging import merged_weight
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Merged(nn.Module):
    """y = x W'^T, and the bias of the base."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        bias = site.base.bias
        self.register_buffer("weight", merged_weight(site), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return functional.linear(x, self.weight, self.bias)


BACKEND = Backend(
    name="merged",
    about="`W + s B A` in fp32, stored in the dtype of `W`; one product",
    place=0,
    build=Merged,
    merged=True,
    traffic="merged",
)
