"""The numbers that a comparison comes to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What was seen on one tensor; the words are those of `types.Comparison`.

    fits      no element is outside what the named arithmetic can honestly write
    blurred   what it can honestly write is known no better than the delta is large
    strange   blocks of codes whose scale follows no known rule
    """

    fits: bool
    exact: bool
    arithmetic: str
    over_budget: int = 0
    worst: float = 0.0
    signal: float = 0.0
    overlap: float = 0.0
    noise: float = 0.0
    vanished: bool = False
    blurred: bool = False
    strange: int = 0
    nonfinite: int = 0


@dataclass(slots=True)
class Sums:
    """Running sums over tiles: |delta|^2, <residual, delta>, |residual|^2."""

    signal: float = 0.0
    cross: float = 0.0
    noise: float = 0.0
    worst: float = 0.0
    nonfinite: int = 0

    def add(self, delta: Tensor, residual: Tensor) -> None:
        """Add one tile; both of one shape, float32 or float64."""
        delta, residual = delta.reshape(-1), residual.reshape(-1)
        self.signal += torch.dot(delta, delta).item()
        self.cross += torch.dot(residual, delta).item()
        self.noise += torch.dot(residual, residual).item()

    @property
    def overlap(self) -> float:
        """<actual - base, delta> = <residual + delta, delta>."""
        return self.signal + self.cross
