"""Statistics of timings, from what is stored alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.latency.nouns import Measured, Row, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Median, p20 and p80 of `count` samples."""

    median: float
    p20: float
    p80: float
    count: int


def summary(timing: Timing) -> Figures:
    """Of the samples of one clock."""
    return of(timing.samples)


def of(samples: tuple[float, ...]) -> Figures:
    """Of any numbers."""
    low, middle, high = np.quantile(np.asarray(samples, dtype=float), (0.2, 0.5, 0.8))
    return Figures(median=float(middle), p20=float(low), p80=float(high), count=len(samples))


def ratios(row: Row, merged: Row | None, clock: str) -> tuple[float, ...]:
    """Row over merged, round by round; empty where they do not pair."""
    if merged is None:
        return ()
    mine, other = (one.clocks[clock].samples if clock in one.clocks else () for one in (row, merged))
    if len(mine) != len(other):
        return ()
    return tuple(one / two for one, two in zip(mine, other, strict=True))


def overhead(row: Row, merged: Row | None, clock: str) -> Figures | None:
    """Median of the ratios of paired rounds - 1, with its p20-p80; None where they do not pair."""
    found = ratios(row, merged, clock)
    return of(tuple(one - 1 for one in found)) if found else None


def spread(measured: Measured, clock: str) -> float | None:
    """The A/A: |ratio - 1| that 60 % of the pairs of merged and merged again keep; None where nothing says."""
    again = next((row for row in measured.rows if row.again), None)
    merged = next((row for row in measured.rows if row.merged and not row.again), None)
    found = ratios(again, merged, clock) if again else ()
    return float(np.quantile(np.abs(np.asarray(found) - 1), 0.6)) if found else None
