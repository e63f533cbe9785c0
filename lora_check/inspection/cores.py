"""Singular values of s B A, exactly, through r x r cores: the product itself, (out, in), is never made.

    B = Q_B R_B,  A^T = Q_A R_A,  R_B R_A^T = U S V^T    =>    s B A = (Q_B U) (s S) (Q_A V)^T

all in float64 from the stored factors; `rounding.core_error` says how exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lora_check.rounding import core_error, factors_noise

MODULES = 2.0**64
"""More modules than a model has: that often |s B A|_F^2 has to fit into float64, for it is summed over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """The singular values of s B A, largest first.

    error   how far each may be off, absolutely
    noise   how large a singular value the roundings of storing A and B can make: smaller ones may be such noise
    """

    values: tuple[float, ...]
    error: float
    noise: float

    @property
    def norm(self) -> float:
        """|s B A|_F."""
        return math.hypot(*self.values)

    @property
    def energy(self) -> tuple[float, ...]:
        """Share of |s B A|_F^2 that the best approximation of rank 1, 2, ... keeps; nothing for a zero update."""
        return shares([value**2 for value in self.values])

    @property
    def rank(self) -> int:
        """How many singular values are surely not zero: the rank of B A as it is stored is at least that."""
        return sum(value > self.error for value in self.values)

    @property
    def resolved(self) -> int:
        """How many are larger than what storing the factors can have made."""
        return sum(value > self.noise + self.error for value in self.values)

    @property
    def effective_rank(self) -> float | None:
        """exp(- sum p ln p), p = sigma / sum of sigma (Roy and Vetterli, "The effective rank", 2007)."""
        return effective_rank(self.values)

    @property
    def stable_rank(self) -> float | None:
        """|s B A|_F^2 / |s B A|_2^2."""
        return (self.norm / self.values[0]) ** 2 if self.values and self.values[0] > 0 else None


@dataclass(frozen=True, slots=True)
class Core:
    """s B A = left diag(values) right^T: (out, r), (r,), (in, r), float64; left and right have orthonormal columns."""

    left: Tensor
    values: Tensor
    right: Tensor


def decompose(b: Tensor, a: Tensor, s: float) -> tuple[Spectrum, Core] | None:
    """The spectrum of s B A and its singular vectors; None: float64 cannot hold the sum of |s B A|_F^2 over a model.

    b (out, r), a (r, in)   as stored and finite
    """
    q_b, r_b = torch.linalg.qr(b.to(torch.float64))
    q_a, r_a = torch.linalg.qr(a.to(torch.float64).T)
    core = r_b @ r_a.T
    if not math.isfinite(MODULES * float(torch.sum((s * core) ** 2))):
        return None
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    norms = _norm(r_b), _norm(r_a)
    spectrum = Spectrum(
        values=tuple((abs(s) * values).tolist()),
        error=abs(s) * core_error(b.shape[0], a.shape[1], a.shape[0]) * norms[0] * norms[1],
        noise=abs(s) * factors_noise(b, a, norms),
    )
    return spectrum, Core(q_b @ u, abs(s) * values, q_a @ v.T)


def shares(squares: Sequence[float]) -> tuple[float, ...]:
    """Running sums, as shares of the whole."""
    total = math.fsum(squares)
    return tuple(one / total for one in accumulate(squares)) if total > 0 else ()


def effective_rank(values: Sequence[float]) -> float | None:
    """The same of any singular values."""
    total = math.fsum(values)
    weights = [value / total for value in values if value > 0] if total > 0 else []
    return math.exp(-math.fsum(p * math.log(p) for p in weights)) if weights else None


def _norm(x: Tensor) -> float:
    """|x|_2."""
    return float(torch.linalg.matrix_norm(x, 2)) if x.numel() else 0.0
