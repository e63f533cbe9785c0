"""How the update lies to the weight that it is added to: its size, and its share in W's leading directions.

W's leading singular directions are found by a randomised range finder with a fixed seed: W G, W W^T W G, ... for a few
random directions G, all of them kept (Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, section 4.5;
Musco and Musco, "Randomized block Krylov methods", 2015). Its accuracy is measured afterwards: U, S and V that it gives
are singular triplets of W + E, E = -R V^T, where R = W V - U S is at hand, for U^T R is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_check.inspection.cores import Core
from lora_check.inspection.modules import Place
from lora_check.sources import Matrix, matrix
from lora_check.types import Checkpoint

SEED, OVERSAMPLED, POWERS = 20211, 8, 8
"""Of the range finder: the seed of its random directions, how many more than r there are, and how often W W^T is
applied. None of them decides anything: what comes of them is measured."""
STRIP = 1 << 20
"""Numbers of W that are in memory as float64 at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """An update beside its weight.

    relative       |s B A|_F / |W|_F
    left, right    share of |s B A|_F^2 within W's r leading left and right singular directions
    chance         the shares that directions drawn at random have: r / out and r / in
    accuracy       |R|_2 / |W|_2: the directions are those of a matrix that lies so near to W
    amplification  |s B A|_F / |U^T W V|_F, U and V the update's own directions (Hu et al., "LoRA", section 7.3); None:
                   W has nothing there
    """

    relative: float
    weight: float
    left: float
    right: float
    chance: tuple[float, float]
    accuracy: float
    amplification: float | None


class Weight:
    """The weight of a module as (out, in), by strips of rows of the tensor that holds it."""

    def __init__(self, base: Checkpoint, place: Place) -> None:
        self.source: Tensor | Matrix = matrix(base, place.tensor)
        rows = place.rows or (0, int(self.source.shape[0]))
        self.start, self.height, self.wide = rows[0], rows[1] - rows[0], int(self.source.shape[1])
        self.turned = place.turned

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.wide, self.height) if self.turned else (self.height, self.wide)

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the tensor, in float64, and which they are."""
        step = max(1, STRIP // max(1, self.wide))
        for first in range(0, self.height, step):
            span = slice(first, min(first + step, self.height))
            yield span, self.source[slice(self.start + span.start, self.start + span.stop)].to(torch.float64)

    def times(self, x: Tensor) -> Tensor:
        """W x.   x (in, k)"""
        return self._across(x) if self.turned else self._down(x)

    def turned_times(self, y: Tensor) -> Tensor:
        """W^T y.   y (out, k)"""
        return self._down(y) if self.turned else self._across(y)

    def norm(self) -> float:
        """|W|_F."""
        return math.sqrt(math.fsum(float(strip.square().sum()) for _, strip in self.strips()))

    def _down(self, x: Tensor) -> Tensor:
        return torch.cat([strip @ x for _, strip in self.strips()])

    def _across(self, y: Tensor) -> Tensor:
        total = torch.zeros((self.wide, y.shape[1]), dtype=torch.float64)
        for span, strip in self.strips():
            total += strip.T @ y[span]
        return total


def leading(weight: Weight, count: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """The `count` leading singular triplets of W, (out, k), (k,), (in, k), and |R|_2 / |W|_2."""
    out, wide = weight.shape
    drawn = min(count + OVERSAMPLED, out, wide)
    start = torch.randn((wide, drawn), dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    blocks = [_orthonormal(weight.times(start))]
    for _ in range(POWERS):
        blocks.append(_orthonormal(weight.times(_orthonormal(weight.turned_times(blocks[-1])))))
    basis = _orthonormal(torch.cat(blocks, dim=1))
    v, values, turn = torch.linalg.svd(weight.turned_times(basis), full_matrices=False)
    count = min(count, values.shape[0])
    u, values, v = basis @ turn.T[:, :count], values[:count], v[:, :count]
    rest = float(torch.linalg.matrix_norm(weight.times(v) - u * values, 2))
    return u, values, v, rest / float(values[0]) if values[0] > 0 else 0.0


def align(core: Core, rank: int, weight: Weight) -> Alignment | None:
    """The update beside its weight; None: one of them is zero.

    rank   how many of the update's directions are surely not zero
    """
    norm, size = weight.norm(), float(core.values.norm())
    if not (norm > 0 and size > 0 and math.isfinite(norm)):
        return None
    u, _, v, accuracy = leading(weight, core.values.shape[0])
    left = (u.T @ core.left * core.values).norm() / size
    right = (v.T @ core.right * core.values).norm() / size
    within = float((core.left[:, :rank].T @ weight.times(core.right[:, :rank])).norm())
    return Alignment(
        relative=size / norm,
        weight=norm,
        left=float(left**2),
        right=float(right**2),
        chance=(u.shape[1] / weight.shape[0], v.shape[1] / weight.shape[1]),
        accuracy=accuracy,
        amplification=size / within if within > 0 else None,
    )


def _orthonormal(x: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(x)[0]
    return q
