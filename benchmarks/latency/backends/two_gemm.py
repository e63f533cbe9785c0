"""Two more products, the second one accumulating into the output of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from benchmarks.latency.backends._adapted import Adapted
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor


class TwoGemm(Adapted):
    """y = x W^T; y += s (x A^T) B^T, with s in the product's own factor: no kernel and no rounding of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        rows = x.reshape(-1, x.shape[-1])
        y = functional.linear(rows, self.weight, self.bias)
        y.addmm_(functional.linear(rows, self.a), self.b.T, alpha=self.s)
        return y.view(*x.shape[:-1], y.shape[-1])


BACKEND = Backend(
    name="two_gemm",
    about="`x A^T`, then `addmm_` of it with `B^T` into the output of the base: two more kernels",
    place=10,
    build=TwoGemm,
    traffic="two",
)
