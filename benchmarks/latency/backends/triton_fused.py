"""Our own kernel: the product of the base with the adapter in it, in one pass over the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.latency.backends._adapted import Adapted
from benchmarks.latency.backends._kernel_place import no_kernels
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Fused(Adapted):
    """h = x A^T in a first small kernel; y = x W^T + bias + s h B^T in a second one."""

    def __init__(self, site: Site) -> None:
        from benchmarks.latency.backends._kernels import fused

        super().__init__(site)
        self.kernel = fused
        self.weight = self.weight.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N); the first call at a shape tries the kernel's configurations."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = self.kernel(rows, self.weight, self.bias, self.a, self.b, self.s)
        return y.view(*x.shape[:-1], y.shape[-1])


BACKEND = Backend(
    name="triton_fused",
    about="our Triton kernel: `x A^T` first, its `B^T` inside the product of the base: one pass over the output",
    place=40,
    build=Fused,
    missing=no_kernels,
    traffic="fused",
)
