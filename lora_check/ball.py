"""Ball: midpoint-radius arithmetic over float64 tensors. Budgets come from here.

A recipe is written once, over @ * + / and row slices. Evaluated on tensors it gives the expected tensor; evaluated on
balls it gives, with no formula of its own, every value that an evaluation in a lesser compute dtype can have
produced, whatever the order of its sums. After Rump, "Fast and parallel interval arithmetic" (BIT 39, 1999).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_check.rounding import FORMATS, UNDERFLOW, gamma, store

OWN = FORMATS["float64"].unit


@dataclass(frozen=True, slots=True)
class Ball:
    """All numbers within `rad` of `mid`, elementwise; `u` is the unit roundoff of the dtype computed in.

    mid, rad   float64, of one shape
    rounds     the dtype that the result of every operation is stored in, where that is not the one computed in: a
               16-bit model whose products are summed in fp32
    """

    mid: Tensor
    rad: Tensor
    u: float
    rounds: str | None = None

    @staticmethod
    def exactly(x: Tensor, u: float, rounds: str | None = None) -> Ball:
        """The ball of radius zero around a stored tensor."""
        mid = x.to(torch.float64)
        return Ball(mid, torch.zeros_like(mid), u, rounds)

    @property
    def shape(self) -> torch.Size:
        return self.mid.shape

    @property
    def T(self) -> Ball:  # noqa: N802  the name that Tensor has
        return self.moved(lambda x: x.T)

    @property
    def mT(self) -> Ball:  # noqa: N802
        return self.moved(lambda x: x.mT)

    @property
    def ndim(self) -> int:
        return self.mid.ndim

    @property
    def bound(self) -> Tensor:
        """|x| at most: |mid| + rad."""
        return self.mid.abs() + self.rad

    @property
    def is_exact(self) -> bool:
        """Whether every radius is zero."""
        return not bool(self.rad.any())

    def __getitem__(self, index: Any) -> Ball:
        return self.moved(lambda x: x[index])

    def __setitem__(self, index: Any, value: Ball) -> None:
        self.mid[index], self.rad[index] = value.mid, value.rad

    def clone(self) -> Ball:
        """A ball of its own tensors."""
        return self.moved(Tensor.clone)

    def reshape(self, *shape: int) -> Ball:
        return self.moved(lambda x: x.reshape(*shape))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Ball:
        """The ball whose elements `move` picks, repeats or puts elsewhere; it computes nothing."""
        return Ball(move(self.mid), move(self.rad), self.u, self.rounds)

    def made(self, mid: Tensor, rad: Tensor) -> Ball:
        """The result of an operation on this ball: `rad` bounds its error, before it is stored."""
        ball = Ball(mid, rad, self.u, self.rounds)
        return ball.stored(self.rounds) if self.rounds else ball

    def __matmul__(self, other: Ball) -> Ball:
        """A B: gamma(k, u) |A| |B| for the sums, and each radius through the other's bound."""
        terms = int(self.mid.shape[-1])
        spread = gamma(terms + 1, self.u + OWN) * (self.bound @ other.bound) + terms * UNDERFLOW
        if not (self.is_exact and other.is_exact):
            spread = spread + self.mid.abs() @ other.rad + self.rad @ other.bound
        return self.made(self.mid @ other.mid, spread)

    def __add__(self, other: Ball) -> Ball:
        return self._rounded(self.mid + other.mid, self.rad + other.rad)

    def __sub__(self, other: Ball) -> Ball:
        return self._rounded(self.mid - other.mid, self.rad + other.rad)

    def __neg__(self) -> Ball:
        return Ball(-self.mid, self.rad, self.u, self.rounds)

    def __mul__(self, other: Ball | float) -> Ball:
        if isinstance(other, Ball):
            return self._rounded(self.mid * other.mid, self.mid.abs() * other.rad + self.rad * other.bound)
        # A Python number is rounded to the compute dtype before it multiplies.
        return self._rounded(self.mid * other, (self.rad + (self.u + OWN) * self.bound) * abs(other))

    def __truediv__(self, other: Ball) -> Ball:
        """a / b for b > 0: |a/b - mid| <= (ra + |mid| rb) / (b - rb)."""
        mid = self.mid / other.mid
        return self._rounded(mid, (self.rad + mid.abs() * other.rad) / (other.mid - other.rad).clamp_min(UNDERFLOW))

    def _rounded(self, mid: Tensor, rad: Tensor) -> Ball:
        return self.made(mid, rad + (self.u + OWN) * (mid.abs() + rad) + UNDERFLOW)

    def stored(self, storage: str) -> Ball:
        """Round to `storage`: monotone, so both ends are rounded and nothing is added; beyond its range: anything."""
        low, high = self.ends(storage)
        mid, rad = (low + high) / 2, (high - low) / 2
        sound = mid.isfinite() & rad.isfinite()
        return Ball(torch.where(sound, mid, self.mid), torch.where(sound, rad, torch.inf), self.u, self.rounds)

    def ends(self, storage: str) -> tuple[Tensor, Tensor]:
        """The least and the largest value of `storage` that a number of this ball is rounded to."""
        return store(self.mid - self.rad, storage), store(self.mid + self.rad, storage)

    def widened(self, relative: float, absolute: float = 0.0) -> Ball:
        """The same middle, with a radius larger by that much of its bound and by that much."""
        return Ball(self.mid, self.rad + relative * self.bound + absolute, self.u, self.rounds)


def norm(x: Tensor | Ball) -> Any:
    """|x[o, :]|_2 as a column (rows, 1).

    A sum of k squares in any order is off by gamma(k, u) at most, all terms having one sign; the root halves that.
    """
    if isinstance(x, Tensor):
        return torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return _root(x.mid.square().sum(1, keepdim=True), x.rad.square().sum(1, keepdim=True), x.shape[1], x)


def squares(x: Tensor | Ball) -> Any:
    """The sum over these rows of x^2, one per column (1, columns), float64; for `root` to finish."""
    if isinstance(x, Tensor):
        return x.to(torch.float64).square().sum(0, keepdim=True)
    return torch.stack([x.mid.square().sum(0, keepdim=True), x.rad.square().sum(0, keepdim=True)])


def root(sums: Tensor, terms: int, like: Tensor | Ball) -> Any:
    """sqrt of what `squares` gathered over all `terms` rows, in the number type of `like`."""
    if isinstance(like, Tensor):
        return sums.sqrt().to(like.dtype)
    return _root(sums[0], sums[1], terms, like)


def _root(squared: Tensor, radii: Tensor, terms: int, like: Ball) -> Ball:
    mid, spread = squared.sqrt(), (radii + terms * UNDERFLOW).sqrt()
    own = gamma(terms, like.u + OWN) / 2 + 2 * like.u
    return like.made(mid, spread + own * (mid + spread) + UNDERFLOW)
