"""A change of a known rank, stored again: what rounding alone shows beyond that rank, measured and not bounded.

The floor is proven, and two or three times as high as the noise that there is: a spectrum that sinks into the noise by
and by seems to end there. So the directions above it are added to W once more and rounded as MERGED was: those that
come after them are all of rounding, and stand beside those of D, each beside the one of its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_check.inferring.deltas import Delta, Factors, History
from lora_check.inferring.floors import PARTS, SEED
from lora_check.inferring.spectrum import Sketch, sketches
from lora_check.rounding import MOST, ulp


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What would lie between the files if these factors were the change: W + change, rounded as MERGED is, minus W.

    afresh   with errors of their own, not those that these very numbers have: subtractive dither (Widrow and Kollar)
    """

    of: Delta
    factors: Factors
    history: History
    afresh: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix."""
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of D."""
        return self.of.dtype

    def spans(self) -> Iterator[slice]:
        """The rows of the matrix, tile by tile."""
        return self.of.spans()

    def tile(self, rows: slice) -> Tensor:
        """Those rows of it, weighed as those of the original are; of several stores, each adds its part."""
        _, base = self.of.both(rows, self.dtype)
        generator = torch.Generator().manual_seed(SEED + rows.start)
        change, stored = self.factors.rows(rows), base
        if self.history.origin.base is not None:  # rounded apart from the merge, it may have lost as much
            stored = base + _within(base, self.history.origin.base, generator)
        parts = PARTS[: self.history.stores]
        for part in parts:
            stored = self._stored(stored + change * (part / sum(parts)), generator)
        delta = stored - base
        return self.of.weights.on(delta, rows) if self.of.weights else delta

    def _stored(self, exact: Tensor, generator: torch.Generator) -> Tensor:
        format_ = self.of.formats[0]
        dither = _within(exact, format_, generator) if self.afresh else torch.zeros_like(exact)
        return (exact + dither).to(getattr(torch, format_)).to(self.dtype) - dither


def _within(values: Tensor, format_: str, generator: torch.Generator) -> Tensor:
    """Anything within half a last place of these."""
    places = torch.rand(values.shape, generator=generator, dtype=torch.float64) - 0.5
    return places.mul_(ulp(values.double(), format_)).to(values.dtype)


def replayed(delta: Delta, factors: Factors, history: History, columns: int, *, afresh: bool = False) -> Tensor:
    """The singular values that the sketches of it find, the last of as many columns as that of D had."""
    again = Replayed(of=delta, factors=factors, history=history, afresh=afresh)
    *_, last = sketches(again, columns)
    return last.values


def are_echoes(values: Tensor, again: Tensor) -> bool:
    """Whether a change of fewer directions shows all of these too: of each, most of its energy is there again."""
    return bool((again.square() >= MOST * values.square()).all())


def hidden(found: Sketch, again: Tensor, rank: int, history: History, times: float = 1.0) -> int:
    """How many directions after so many stand above those of the same change replayed, by more than chance.

    again   singular values of the replay, from as many columns as `found` has
    times   by how much the noise of the replay may be smaller than that of D, for other reasons than chance
    """
    above = found.values[rank:] > history.noise.wobble * times * again[rank : len(found.values)]
    return int(above.long().cumprod(0).sum())


def absorbed(found: Sketch, rank: int) -> float:
    """1 / sqrt((1 - r / m) (1 - r / n)): by how much the noise of a replay may be smaller than that of D.

    The factors hold that share of the noise of D besides, which is then missing from W + change before it is rounded.
    Errors made afresh miss nothing, but do not follow a change of less than one last place as real ones do.
    """
    rows, columns = len(found.left), len(found.right)
    share = (1 - rank / rows) * (1 - rank / columns)
    return math.sqrt(1 / share) if share > 0 else math.inf


def is_all_there(found: Sketch, again: Tensor, rank: int, history: History) -> bool:
    """Whether what comes after so many directions is no weaker than in the replay, but for chance."""
    return bool((history.noise.wobble * found.values[rank:] >= again[rank : len(found.values)]).all())
