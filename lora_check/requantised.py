"""Measures of tensors that are, or were, in codes; `codes` decides, here is told what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_check import codes
from lora_check.compare import Measure, Sums, differing, same_bits
from lora_check.quantised import Stored
from lora_check.replay import expected, tiles
from lora_check.types import Arithmetic, Case, Grid


def measure_codes(case: Case, actual: Tensor, orders: Sequence[Arithmetic]) -> Measure:
    """Measure a merged tensor that is stored as codes, by the grid of its case.

    actual   the numbers that the codes stand for, (rows, columns)
    """
    assert case.grid is not None
    found = codes.judge(case, case.grid, orders)
    return _measure(case, actual, found, case.grid if found.over else None)


def measure_again(case: Case, grid: Grid, actual: Tensor, orders: Sequence[Arithmetic]) -> Measure | None:
    """Measure a merged tensor that was quantised as the base is and decoded again; None: it was not.

    grid   of the base
    """
    found = codes.through(case, grid, actual, orders)
    if found is None:
        return None
    measure = _measure(case, actual, found, None)
    return replace(measure, arithmetic=f"{measure.arithmetic}-quantised-again") if measure.fits else None


def measure_stored(base: Stored, merged: Stored) -> Measure:
    """Measure a quantised tensor that is copied: codes, scales and tables byte by byte, headers by what they say."""
    ours, theirs = ({role: part for role, part in one.parts().items() if role != "header"} for one in (base, merged))
    over = int(base.coded.facts != merged.coded.facts)
    for role in ours.keys() | theirs.keys():
        over += _apart(ours.get(role), theirs.get(role))
    return Measure(fits=not over, exact=not over, arithmetic="", over_budget=over)


def _apart(one: Tensor | None, other: Tensor | None) -> int:
    """In how many elements two tensors differ; one that is not there, or is of another kind, differs in all."""
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return max(part.numel() for part in (one, other) if part is not None)
    return 0 if same_bits(one, other) else differing(one, other)


def _measure(case: Case, actual: Tensor, found: codes.Found, grid: Grid | None) -> Measure:
    """Sums over all elements; where some are over budget, `grid` says how far each may lie from its level."""
    truth, sums, unmoved = expected(case), Sums(), True
    for span in tiles(case):
        rows, seen = truth.rows(span), actual[span].to(torch.float64)
        sound = seen.isfinite()
        residual = torch.where(sound, seen - rows.total, torch.zeros_like(seen))
        sums.nonfinite += int((~sound).sum().item())
        sums.add(rows.delta, residual)
        if grid is not None:
            times = residual.abs() / codes.reach(grid, span, seen)
            sums.worst = max(sums.worst, times.nan_to_num(0.0, 0.0, 0.0).max().item())
        unmoved = unmoved and same_bits(case.base[span].to(actual.dtype), actual[span])
    fits = not found.over and not sums.nonfinite
    return Measure(
        fits=fits,
        exact=fits and found.exact,
        arithmetic=found.arithmetic.name,
        over_budget=found.over,
        worst=sums.worst,
        signal=sums.signal,
        overlap=sums.overlap,
        noise=sums.noise,
        vanished=fits and unmoved and sums.signal > 0,
        blurred=fits and not found.exact and found.width >= sums.signal > 0,
        strange=found.strange,
        nonfinite=sums.nonfinite,
    )
