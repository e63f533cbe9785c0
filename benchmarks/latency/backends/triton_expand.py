"""The library's product of the base, then one kernel of our own that adds the adapter to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from benchmarks.latency.backends._adapted import Adapted
from benchmarks.latency.backends._kernel_place import no_kernels
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Expand(Adapted):
    """y = x W^T + bias; y += s (x A^T) B^T, both products in one kernel."""

    def __init__(self, site: Site) -> None:
        from benchmarks.latency.backends._kernels import add

        super().__init__(site)
        self.kernel = add

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N); the first call at a shape tries the kernel's configurations."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = functional.linear(rows, self.weight, self.bias)
        self.kernel(rows, self.a, self.b, self.s, y)
        return y.view(*x.shape[:-1], y.shape[-1])


BACKEND = Backend(
    name="triton_expand",
    about="the product of the base, then one Triton kernel of ours for `x A^T` and `B^T`, added into the output",
    place=41,
    build=Expand,
    missing=no_kernels,
    traffic="two",
)
