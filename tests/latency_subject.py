"""Small subjects of the latency benchmark, made by hand: linear layers with adapters that the gate can see."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.latency.nouns import Backend, Place, Site, Subject

CPU = Place(device="cpu", cache=1)
S = 1.75
INPUTS, OUTPUTS, RANK = 48, 40, 5


def site(
    dtype: torch.dtype,
    *,
    seed: int = 0,
    inputs: int = INPUTS,
    outputs: int = OUTPUTS,
    strength: float = 1.0,
    bias: bool = False,
    chosen: tuple[int, ...] | None = None,
) -> Site:
    """Normal numbers; |s B A| is `strength` times |W|, for each adapter."""
    g = torch.Generator().manual_seed(seed)
    base = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in base.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) / inputs**0.5)
    adapters = 1 if chosen is None else max(chosen) + 1
    a = torch.randn(adapters, RANK, inputs, generator=g)
    b = torch.randn(adapters, outputs, RANK, generator=g)
    b *= strength * base.weight.float().norm() / (S * (b @ a)).norm(dim=(1, 2), keepdim=True)
    picked = None if chosen is None else torch.tensor(chosen)
    return Site(base=base, a=a.to(dtype), b=b.to(dtype), s=S, chosen=picked)


class Layers(nn.Module):
    """Linear layers one after the other, with something in between."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({path.rpartition(".")[2]: one.base for path, one in sites.items()})

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.inner.values()):
            x = layer(torch.tanh(x) if number else x)
        return x


def subject(
    dtype: torch.dtype = torch.float32,
    *,
    copies: int = 2,
    widths: tuple[int, ...] = (INPUTS, OUTPUTS),
    shape: tuple[int, ...] = (2, 3),
    device: str = "cpu",
    **kwargs: object,
) -> Subject:
    """Copies of so many layers, with static inputs that `refill` draws anew by its seed."""
    sites = tuple(
        {
            f"inner.layer{n}": site(dtype, seed=10 * copy + n, inputs=k, outputs=o, **kwargs)  # type: ignore[arg-type]
            for n, (k, o) in enumerate(pairwise(widths))
        }
        for copy in range(copies)
    )
    inputs = tuple((torch.empty(*shape, widths[0], dtype=dtype, device=device),) for _ in range(copies))
    if device != "cpu":
        sites = tuple({path: moved(one, device) for path, one in each.items()} for each in sites)

    def refill(seed: int) -> None:
        g = torch.Generator(device=device).manual_seed(seed)
        for (x,) in inputs:
            x.normal_(generator=g)

    refill(0)
    return Subject(
        copies=tuple(Layers(each) for each in sites),
        targets=tuple(sites[0]),
        sites=sites,
        inputs=inputs,
        refill=refill,
        call=lambda module, given: module(*given),
    )


def moved(one: Site, device: str) -> Site:
    """The same on a device."""
    return Site(base=one.base.to(device), a=one.a.to(device), b=one.b.to(device), s=one.s)


def weight(one: Site, adapter: int = 0) -> Tensor:
    """W + s B A in float32, stored once."""
    wide = one.base.weight.float() + one.s * (one.b[adapter].float() @ one.a[adapter].float())
    return wide.to(one.base.weight.dtype)


class Merged(nn.Module):
    """x W'^T."""

    def __init__(self, one: Site) -> None:
        super().__init__()
        self.register_buffer("weight", weight(one))
        self.bias = one.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Unmerged(nn.Module):
    """x W^T + s x A^T B^T, each step in the dtype of the base."""

    def __init__(self, one: Site) -> None:
        super().__init__()
        self.site = one

    def forward(self, x: Tensor) -> Tensor:
        return self.site.base(x) + (x @ self.site.a[0].T @ self.site.b[0].T) * self.site.s


def backend(name: str, build: object, **kwargs: object) -> Backend:
    """A backend of a test."""
    return Backend(name=name, about=f"{name}, made for a test", place=1, build=build, **kwargs)  # type: ignore[arg-type]


MERGED = backend("merged", Merged, merged=True)
UNMERGED = backend("unmerged", Unmerged)
