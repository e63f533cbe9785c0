"""A batch in which each sequence has its own adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


class Shared(nn.Module):
    """W (N, K) and its bias are the base's own; A (n, r, K), B (n, N, r); `names`: the adapter of each sequence."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        bias = site.base.bias
        self.register_buffer("weight", site.base.weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.register_buffer("a", site.a.detach().contiguous(), persistent=False)
        self.register_buffer("b", site.b.detach().contiguous(), persistent=False)
        self.s, self.names = site.s, chosen(site)


def chosen(site: Site) -> list[int]:
    """The adapter of each sequence of the batch, as the host knows it."""
    assert site.chosen is not None, "a batch of several adapters says which sequence has which"
    names: list[int] = site.chosen.tolist()
    return names


def by_sequence(x: Tensor, batch: int) -> Tensor:
    """x (batch, L, K) of (batch, L, K), or of (batch * L, K) with the tokens of a sequence side by side; a view."""
    return x.reshape(batch, -1, x.shape[-1])


def like(y: Tensor, x: Tensor) -> Tensor:
    """y with the leading dimensions of x."""
    return y.reshape(*x.shape[:-1], y.shape[-1])
