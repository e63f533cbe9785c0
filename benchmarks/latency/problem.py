"""The numbers of a cell: weights, activations, factors, all drawn on the device from seeds that the cell gives.

Everything is normal, for zeros and small ranges of numbers run faster than what a model holds:

    W  (N, K)   deviation 1/sqrt(K), so that activations keep their size through any number of layers
    x           deviation 1
    A  (r, K)   deviation 1/sqrt(K), as it is before training and hardly changed by it
    B  (N, r)   normal too, never the zeros of a fresh adapter, scaled so that ||s B A||_F = ||W||_F
    s           alpha / r = 3/2, with alpha = 3 r / 2: not 1, and no power of two, or a forgotten scale and a rounded
                one would not show

A trained delta is a hundredth of its weight or so. Here it is as large, because the budget within which an output is
right is that of the worst case. With these numbers |x| |W|^T is (2/pi) sqrt(K), 41 at K = 4096, where x W^T has
deviation 1; rounding the weights to bfloat16 alone may cost 2^-8 of it, 0.16. An adapter of the usual size adds 0.01
and could be left out without being caught; this one adds 1. What a forward costs does not depend on it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from benchmarks.latency.nouns import Cell, Place, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Made = TypeVar("Made")

S = 1.5
"""alpha / r."""
OUTRUN = 5
"""The weights of one round are so many times the cache: what a call reads has been pushed out since it was last read.
Benchmarks of kernels take twice the cache (a flush) to five times (rotated buffers); the larger is the safer."""
NORM = 0.1
"""Deviation from one of the scale of a norm, and from nought of a bias."""


def copies(cell: Cell, place: Place, size: int) -> int:
    """ceil(5 cache / size) copies of `size` bytes, when the cell is cold: the bytes read between two reads of one byte
    are those of a whole round. One when it is hot.
    """
    return 1 if cell.cache == "hot" else max(1, math.ceil(OUTRUN * place.cache / size))


def generator(device: str, *of: Hashable) -> torch.Generator:
    """A generator of a device, seeded by what is made with it."""
    import torch

    return torch.Generator(device=device).manual_seed(zlib.crc32(repr(of).encode()))


# ------------------------------------------------------------------------------------------------------ the base


_kept: dict[Hashable, object] = {}


def kept(key: Hashable, build: Callable[[], Made]) -> Made:
    """What was built last, if it is asked for again; else it is let go before another is built.

    One base serves all cells that differ in rank, tokens or targets. Its modules are shared: what is put in place of a
    target has to be taken out again.
    """
    if key not in _kept:
        release()
        _kept[key] = build()
    return _kept[key]  # type: ignore[return-value]


def release() -> None:
    """Let go of the base that was kept."""
    _kept.clear()


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter in place, in its own dtype: weights, scales of norms around 1, biases around 0."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.normal_(float(not name.endswith("bias")), NORM, generator=generator)


# --------------------------------------------------------------------------------------------------- the adapters


def sites(module: nn.Module, targets: Sequence[str], cell: Cell, place: Place, number: int) -> Mapping[str, Site]:
    """The adapters of one copy, the `number`-th of its subject, at each target."""
    drawn = generator(place.device, "adapters", cell.workload, cell.shape, cell.rank, cell.adapters, number)
    of = chosen(cell, place)
    return {target: site(module.get_submodule(target), cell, drawn, of) for target in targets}


def site(base: nn.Module, cell: Cell, generator: torch.Generator, chosen: Tensor | None) -> Site:
    """One target with its n adapters."""
    import torch

    assert isinstance(base, torch.nn.Linear)
    pairs = [factors(base.weight, cell.rank, generator) for _ in range(cell.adapters)]
    a, b = (torch.stack(some) for some in zip(*pairs, strict=True))
    return Site(base=base, a=a, b=b, s=S, chosen=chosen)


def factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r) in the dtype of W, with ||s B A||_F = ||W||_F but for their rounding.

    ||B A||_F^2 = <B^T B, A A^T>, of which both are (r, r): the delta itself is never formed.
    """
    import torch

    (rows, columns), device = weight.shape, weight.device
    a = torch.randn(rank, columns, generator=generator, device=device).mul_(columns**-0.5).to(weight.dtype)
    b = torch.randn(rows, rank, generator=generator, device=device)
    wide, tall = a.double(), b.double()
    delta = ((tall.mT @ tall) * (wide @ wide.mT)).sum().sqrt()
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64)
    return a, (tall * (norm / (S * delta))).to(weight.dtype)


def chosen(cell: Cell, place: Place) -> Tensor | None:
    """The adapter of each sequence: ..., n-1, ..., 1, 0 in turn, so never sorted; None when there is but one."""
    import torch

    if cell.adapters == 1:
        return None
    return (torch.arange(cell.batch, device=place.device).flip(0) % cell.adapters).contiguous()
