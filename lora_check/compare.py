"""The tile loop: (Case, actual) -> numbers. One pass over the bytes; a second only for what the first cannot verify.

First pass   the arithmetic that made the model's other tensors is performed in its own dtypes and compared bit by bit.
             Elements that differ are asked whether an honest merge of that arithmetic can have written them (balls,
             float64); if not, whether any order can have written their rows (one bound, float64): if not, the tensor is
             refuted. `first_pass` has it, rows apart.
Second pass  when an element is outside: every arithmetic is tried, bits first and then balls, all in float64.

Nothing is refuted by less than float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_check import codes
from lora_check.exclusion import excluded
from lora_check.first_pass import PROBE_ELEMENTS, Closer, Part, copy_part, is_excluded, look, whole
from lora_check.measure import Measure, Sums
from lora_check.number_kinds import dtype_of, name_of
from lora_check.replay import TILE_ELEMENTS, Rows, bits, bounds, expected, tiles, written
from lora_check.rounding import ADD, ANY, FORMATS, half_cell
from lora_check.same import differing, same_bits
from lora_check.tally import tally
from lora_check.trial import Trial
from lora_check.truncation import excess
from lora_check.types import Arithmetic, Case

__all__ = [
    "Match",
    "Measure",
    "Sums",
    "compare",
    "compare_copy",
    "differing",
    "factor_range",
    "likely",
    "reproduces",
    "same_bits",
    "writes",
]


def growing(case: Case) -> Iterator[slice]:
    """Row ranges that begin small: a wrong hypothesis dies in the first few rows, a right one soon sees whole tiles."""
    size, start = PROBE_ELEMENTS, 0
    while start < case.rows:
        stop = min(case.rows, start + max(1, size // max(1, int(case.base.shape[1]))))
        yield slice(start, stop)
        start, size = stop, min(TILE_ELEMENTS, size * 4)


def likely(cases: Sequence[tuple[Case, Tensor]], orders: Sequence[Arithmetic]) -> Arithmetic:
    """The arithmetic that reproduces the first rows of most of these tensors; the first of `orders` if none does."""
    votes = dict.fromkeys((how.name for how in orders), 0)
    for case, actual in cases:
        span = next(iter(tiles(case)))
        for how in orders:  # one after the other: each holds the factors in its own dtype
            votes[how.name] += same_bits(Trial(case, how).bits(span), actual[span])
    return max(orders, key=lambda how: votes[how.name])


def compare(case: Case, actual: Tensor, orders: Sequence[Arithmetic], first: Arithmetic | None = None) -> Measure:
    """Measure a merged tensor that has deltas against every honest order of operations.

    actual   (rows, columns), in the storage dtype
    orders   the arithmetics to try; the first that reproduces all bits is named, else the first that may have
    first    the one to try alone, before all the others
    """
    if first is not None and first in orders:
        rows = slice(0, case.rows)
        seen = look(case, actual, first, rows)
        found = _counted(case, actual, first) if seen is Closer.EXCLUDED else None
        if isinstance(seen, Part):
            found = whole([seen], first)
        if found:
            return found
    return _second_pass(case, actual, orders)


def compare_copy(case: Case, actual: Tensor, orders: Sequence[Arithmetic]) -> Measure:
    """Measure a tensor that is copied: bit for bit, or wrong. The orders matter only by the dtype they load."""
    counts: list[tuple[int, str]] = []
    for how in orders:
        over = _copy_mismatches(case, actual, how, stop=bool(counts))
        if over == 0:
            return Measure(fits=True, exact=True, arithmetic=how.name)
        counts.append((over, how.name))
    over, name = counts[0]
    return Measure(
        fits=False,
        exact=False,
        arithmetic=name,
        over_budget=over,
        nonfinite=_nonfinite(case, actual),
    )


class Match(NamedTuple):
    """An arithmetic under which a case can have written a tensor, and whether it gives the very bits."""

    arithmetic: Arithmetic
    exact: bool


def reproduces(
    case: Case,
    actual: Tensor,
    orders: Sequence[Arithmetic],
    widest: float = float("inf"),
    *,
    bit_by_bit: bool = False,
) -> Match | None:
    """The first arithmetic under which `case` can have written `actual`, element by element; None if there is none.

    widest      a sum of squared half-widths from which on an interval says nothing, unless the bits agree
    bit_by_bit  only the very bits are of interest

    The first rows decide most hypotheses: one bound for all orders at once, then each order, those that match bit by
    bit before those that only may.
    """
    if case.grid is not None:
        if not case.steps and case.base.dtype == actual.dtype and same_bits(case.base, actual):
            return Match(orders[0], True)
        found = codes.fits(case, case.grid, orders, widest)
        return Match(found.arithmetic, found.exact) if found and (found.exact or not bit_by_bit) else None
    if not {case.storage, name_of(case.base.dtype)} <= FORMATS.keys():
        same = not case.steps and same_bits(case.base.to(actual.dtype), actual)
        return Match(orders[0], True) if same else None
    probe, *rest = growing(case)
    if excluded(case, actual[probe], probe):
        return None
    if bit_by_bit:
        return next((Match(how, True) for how in orders if writes(case, actual, how)), None)
    if not bool(Trial(case, ANY).allows(actual[probe], probe).all()):
        return None
    alive = [trial for trial in (Trial(case, how) for how in orders) if trial.over(actual[probe], probe) == 0]
    for trial in sorted(alive, key=lambda trial: not trial.exact):
        if all(trial.over(actual[span], span) == 0 for span in rest) and (trial.exact or trial.width < widest):
            return Match(trial.how, trial.exact)
    return None


def writes(case: Case, actual: Tensor, how: Arithmetic) -> bool:
    """Whether this arithmetic, performed here, gives the very bits."""
    producer = written(case, how) if case.grid is None else None
    return producer is not None and all(
        same_bits(bits(producer.rows(span).total, case, how), actual[span]) for span in growing(case)
    )


def factor_range(case: Case, actual: Tensor, likely_factor: float, roundings: int = 0) -> tuple[float, float]:
    """The factors c for which rounding W + c delta can give `actual` everywhere; low > high if there is none.

    Each element whose delta is not zero says: actual - reach <= W + c delta <= actual + reach; the reach is what the
    roundings on the way come to. It only proposes factors; who asks for them, replays.
    """
    truth, balls, low, high = expected(case), bounds(case, ADD), -float("inf"), float("inf")
    parts = [expected(replace(case, steps=(step,))) for step in case.steps]
    scale = max(1.0, abs(likely_factor))
    for span in tiles(case):
        seen, rows = actual[span].to(torch.float64), truth.rows(span)
        sizes = [scale * part.rows(span).delta.abs() for part in parts]
        reach = _reach(seen, rows.base, sizes, roundings, case.storage) + scale * balls.rows(span).total.rad
        if case.grid is not None:
            reach = reach + codes.reach(case.grid, span, seen)
        moved = rows.delta != 0
        if not bool(moved.any()):
            continue
        gap, delta = (seen - rows.base)[moved], rows.delta[moved]
        ends = torch.stack([(gap - reach[moved]) / delta, (gap + reach[moved]) / delta]).sort(0).values
        low, high = max(low, ends[0].max().item()), min(high, ends[1].min().item())
        if not low <= high:
            break
    return low, high


def _reach(seen: Tensor, base: Tensor, sizes: Sequence[Tensor], roundings: int, storage: str) -> Tensor:
    """Half an ulp of the stored value, of each value stored between two steps, and of each delta for each rounding."""
    reach, size = half_cell(seen, storage), base.abs()
    for step in sizes[:-1]:
        size = size + step
        reach = reach + half_cell(size, storage)
    for step in sizes if roundings else ():
        reach = reach + roundings * half_cell(step, storage)
    return reach


# ------------------------------------------------------------------------------------------------ second pass


def _second_pass(case: Case, actual: Tensor, orders: Sequence[Arithmetic]) -> Measure:
    """Try every arithmetic; those that a tile excludes are dropped until one is left, which then only counts."""
    if case.rows and is_excluded(case, actual, slice(0, case.rows)) and (seen := _counted(case, actual, orders[0])):
        return seen
    truth, sums, vanished = expected(case), Sums(), True
    alive = [Trial(case, how) for how in orders]
    for span in growing(case):
        rows = actual[span]
        if len(alive) > 1 and not bool(Trial(case, ANY).allows(rows, span).all()):
            alive = alive[:1]
        counts = [trial.over(rows, span) for trial in alive]
        alive = [trial for trial, count in zip(alive, counts, strict=True) if count == min(counts)]
        if any(trial.total for trial in alive):
            alive = alive[:1]
        _add_exactly(sums, case, rows, truth.rows(span), alive[0], span)
        vanished = vanished and _could_be_base(case, alive, span)
    for trial in alive:
        if not trial.total and not trial.exact and trial.width >= sums.signal > 0 and trial.balls:
            _ask_once_more(trial, actual, sums)
    best = min(alive, key=lambda trial: (trial.total, not trial.exact))
    return Measure(
        fits=best.total == 0 and sums.nonfinite == 0,
        exact=best.exact and sums.nonfinite == 0,
        arithmetic=best.how.name,
        over_budget=best.total,
        worst=sums.worst,
        signal=sums.signal,
        overlap=sums.overlap,
        noise=sums.noise,
        vanished=vanished and sums.signal > 0,
        blurred=best.total == 0 and best.width >= sums.signal > 0,
        nonfinite=sums.nonfinite,
    )


def _ask_once_more(trial: Trial, actual: Tensor, sums: Sums) -> None:
    """Of a trial whose intervals are as wide as the delta: whether all elements together exclude it."""
    found = excess(trial.case, actual, trial.how, trial.balls) if trial.balls else 0.0
    if found > 1:
        trial.total, sums.worst = 1, max(sums.worst, found)


def _add_exactly(sums: Sums, case: Case, rows: Tensor, truth: Rows, trial: Trial, span: slice) -> None:
    seen, total = rows.to(torch.float64), truth.total
    sound = seen.isfinite()
    sums.nonfinite += int((~sound).sum().item())
    residual = torch.where(sound, seen - total, torch.zeros_like(total))
    sums.add(truth.delta, residual)
    if trial.total:
        low, high = trial.honest(span)
        budget = torch.maximum(high - total, total - low) + half_cell(total, case.storage)
        sums.worst = max(sums.worst, (residual.abs() / budget).nan_to_num(0).max().item())


def _counted(case: Case, actual: Tensor, how: Arithmetic) -> Measure | None:
    """Numbers for a tensor of which no order at all can have written some rows; None: it wants a closer look."""
    found = tally(case, actual, how)
    if found is None or not found.over:
        return None
    sums = Sums(signal=found.signal, cross=found.cross, noise=found.noise)
    return Measure(
        fits=False,
        exact=False,
        arithmetic=how.name,
        over_budget=found.over,
        worst=found.worst,
        signal=sums.signal,
        overlap=sums.overlap,
        noise=sums.noise,
        vanished=found.unmoved and sums.signal > 0,
    )


def _could_be_base(case: Case, alive: Sequence[Trial], span: slice) -> bool:
    """Whether the base's own bits would pass on this tile too, under some arithmetic still in question."""
    base = case.base[span].to(dtype_of(case.storage))
    return any(bool(trial.allows(base, span).all()) for trial in alive)


def _nonfinite(case: Case, actual: Tensor) -> int:
    """NaNs and infinities of a tensor, where it can hold any; those that the base holds too are its own affair."""
    if not actual.is_floating_point() or case.storage not in FORMATS:
        return 0
    wrong = (~actual[span].isfinite() & case.base[span].isfinite() for span in tiles(case))
    return sum(int(one.sum().item()) for one in wrong)


def _copy_mismatches(case: Case, actual: Tensor, how: Arithmetic, *, stop: bool) -> int:
    if not case.steps and case.base.dtype == actual.dtype:
        if copy_part(case, actual, slice(0, case.rows)):
            return 0
        return sum(_differing_rows(case.base[span], actual[span]) for span in tiles(case))
    producer, over = written(case, how), 0
    for span in tiles(case):
        made = bits(producer.rows(span).total, case, how)
        # A small number that became -0 in a narrower dtype is +0 once PEFT has added 0 to it there.
        over += _differing_rows(made + 0 if case.unsigned else made, actual[span])
        if over and stop:
            break
    return over


def _differing_rows(one: Tensor, other: Tensor) -> int:
    return 0 if same_bits(one, other) else differing(one, other)
