"""What the plain backends hold: W, its bias, A, B and s of one adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Adapted(nn.Module):
    """W (N, K) and its bias (N,) or None are the base's own; A (r, K), B (N, r); nothing learns."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        bias = site.base.bias
        self.register_buffer("weight", site.base.weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.register_buffer("a", site.a[0].detach().contiguous(), persistent=False)
        self.register_buffer("b", site.b[0].detach().contiguous(), persistent=False)
        self.s = site.s


class Formula(Adapted):
    """y = x W^T + ((x A^T) B^T) s, every step rounded to the dtype of the base."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        expanded = functional.linear(functional.linear(x, self.a), self.b)
        return functional.linear(x, self.weight, self.bias) + expanded * self.s
