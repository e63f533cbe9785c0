"""Code space: can an honest merge, quantised, have become these codes and scales?

An honest merge leaves each element in an interval; a grid says which interval each stored code stands for, once it is
known by what its block was divided. Both follow from the arithmetic: the divisor of a block is its largest modulus,
which lies between the largest lower and the largest upper bound of its elements. So two walks over the rows decide, the
first for the divisors, the second for the codes; neither knows a tolerance. An element of a block whose scale no honest
maximum gives is as wrong as one whose code is.

`through` asks the same of a merge that was quantised and decoded again: of which no codes are left, only their levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_check.grids import U
from lora_check.number_kinds import name_of
from lora_check.replay import bits, bounds, interval, tiles, written
from lora_check.rounding import ANY, arithmetics, cell, gamma, half_cell, store
from lora_check.types import Arithmetic, Case, Grid

Interval = tuple[Tensor, Tensor]

PROBE_ELEMENTS = 1 << 12
"""Elements of the first rows, on which a hypothesis is tried."""


class Found(NamedTuple):
    """How well a case explains codes: the arithmetic, and how many elements it cannot have written.

    exact     the numbers that the arithmetic itself writes lie in the cells of all codes
    strange   how many blocks have a scale that follows no known rule
    width     the sum of the squared half-widths of what the elements may honestly be before they are quantised, or once
              they are decoded again
    """

    arithmetic: Arithmetic
    over: int
    exact: bool
    strange: int
    width: float = 0.0


def judge(case: Case, grid: Grid, orders: Sequence[Arithmetic]) -> Found:
    """The first arithmetic whose honest merges can have become these codes, else the one that explains most of them."""
    return _fitting(case, grid, orders) or min(_failing(case, grid, orders), key=lambda found: found.over)


def fits(case: Case, grid: Grid, orders: Sequence[Arithmetic], widest: float = float("inf")) -> Found | None:
    """The first arithmetic whose honest merges can have become these codes; strange scales explain nothing.

    widest   a sum of squared half-widths from which on an interval says nothing, unless the bits agree
    """
    found = _fitting(case, grid, orders)
    return found if found and not found.strange and (found.exact or found.width < widest) else None


def _fitting(case: Case, grid: Grid, orders: Sequence[Arithmetic]) -> Found | None:
    """Those whose own numbers fit come before those that only may have written the codes, known scales before strange.

    The first rows decide most.
    """
    alive = [way for way in _ways(case, grid.dtypes, orders, grid) if not _outside_at_first(_honest(*way), grid)]
    doubtful: Found | None = None
    for make in (_written, _honest):
        for way in alive:
            seen = _Codes(make(*way), grid)
            if seen.over(stop=True):
                continue
            found = Found(way[1], 0, seen.walk.exact, seen.strange, seen.width)
            if not found.strange:
                return found
            doubtful = doubtful or found
    return doubtful


def _failing(case: Case, grid: Grid, orders: Sequence[Arithmetic]) -> Iterator[Found]:
    """How those fail that fail least in the first rows; of those that fail there alike, the first."""
    ways = [(_outside_at_first(_honest(*way), grid), way) for way in _ways(case, grid.dtypes, orders)]
    least = min(count for count, _ in ways)
    alike = [way for count, way in ways if count == least]
    for way in alike[:1] if least else alike:
        seen = _Codes(_honest(*way), grid)
        yield Found(way[1], seen.over(), False, seen.strange)


def reach(grid: Grid, span: slice, seen: Tensor) -> Tensor:
    """How far each number may have lain from the one that its code stands for, by its code and its scale alone.

    seen   the numbers that the codes of these rows stand for, float64
    """
    codes, blocks = grid.codes[span].long(), grid.blocks.of(span)
    endless = torch.full((grid.blocks.count,), torch.inf, dtype=torch.float64)
    divisors = [one[blocks] for one in grid.scales.divisors(torch.zeros_like(endless), endless)]
    gaps = [(end[codes] * divisor - seen).abs() for end in (grid.least, grid.largest) for divisor in divisors]
    gap = torch.stack(gaps).amax(0)
    return gap + torch.stack([half_cell(seen.abs() + gap, dtype) for dtype in grid.dtypes]).amax(0)


# ------------------------------------------------------------------------------------------------------- walks


@dataclass(frozen=True, slots=True)
class _Walk:
    """Rows of a case -> the least and the largest number that is quantised.

    exact   they are one: what the arithmetic writes          any   they hold for every order at once
    """

    case: Case
    rows: Callable[[slice], Interval]
    exact: bool = False
    any: bool = False


def _ways(
    case: Case, dtypes: Sequence[str], orders: Sequence[Arithmetic], grid: Grid | None = None
) -> Iterator[tuple[Case, Arithmetic]]:
    """Every dtype that the numbers may have had, in every order of operations.

    grid   leave out the dtypes for which no order at all can have written the first rows
    """
    others, combines = (any(getattr(step.recipe, key) for step in case.steps) for key in ("method", "combines"))
    for storage in dtypes:
        held = replace(case, storage=storage)
        if grid is not None and _outside_at_first(_honest(held, ANY), grid):
            continue
        same = storage == case.storage
        for how in orders if same else arithmetics(storage, name_of(case.base.dtype), others, combines):
            yield held, how


def _written(case: Case, how: Arithmetic) -> _Walk:
    producer = written(case, how)

    def rows(span: slice) -> Interval:
        stored = bits(producer.rows(span).total, case, how).double()
        return stored, stored

    return _Walk(case, rows, exact=True)


def _honest(case: Case, how: Arithmetic) -> _Walk:
    balls = bounds(case, how)

    def rows(span: slice) -> Interval:
        low, high = interval(balls.rows(span).total, case, how)
        return store(low, case.storage), store(high, case.storage)

    return _Walk(case, rows, any=how is ANY)


def _maxima(walk: _Walk, grid: Grid, spans: Iterator[slice]) -> Interval:
    """The least and the largest that the largest modulus of each block can be."""
    low = torch.zeros(grid.blocks.count, dtype=torch.float64)
    high = torch.zeros_like(low)
    for span in spans:
        least, largest = walk.rows(span)
        inner = torch.where((least <= 0) & (largest >= 0), 0.0, torch.minimum(least.abs(), largest.abs()))
        blocks = grid.blocks.of(span).flatten()
        low.scatter_reduce_(0, blocks, inner.flatten(), "amax")
        high.scatter_reduce_(0, blocks, torch.maximum(least.abs(), largest.abs()).flatten(), "amax")
    return low, high


# ------------------------------------------------------------------------------------------------------- codes


@dataclass(slots=True)
class _Codes:
    """Stored codes and scales against one walk; what was seen on the way is kept."""

    walk: _Walk
    grid: Grid
    strange: int = 0
    width: float = 0.0

    def over(self, *, stop: bool = False) -> int:
        """How many elements no honest merge has quantised so; `stop` at the first tile that has any."""
        low, high = _maxima(self.walk, self.grid, tiles(self.walk.case))
        divisors = self.grid.scales.divisors(low, high)
        wrong = self.grid.scales.wrong(low, high)
        self.strange = int(self.grid.scales.strange(low, high).sum().item())
        over = 0
        for span in tiles(self.walk.case):
            blocks = self.grid.blocks.of(span)
            over += int((self.outside(span, blocks, divisors) | wrong[blocks]).sum().item())
            if over and stop:
                break
        return over

    def outside(self, span: slice, blocks: Tensor, divisors: Interval) -> Tensor:
        """Elements whose honest interval misses the cell of their code."""
        codes = self.grid.codes[span].long()
        ends = [end[codes] * one[blocks] for end in (self.grid.least, self.grid.largest) for one in divisors]
        low, high = self.walk.rows(span)
        self.width += ((high - low) / 2).square().sum().nan_to_num(torch.inf).item()
        least, largest = torch.minimum(ends[0], ends[1]), torch.maximum(ends[2], ends[3])
        if self.walk.any:  # a bound that could not be found excludes nothing
            return (low > largest) | (least > high)
        return ~((low <= largest) & (least <= high))


def _outside_at_first(walk: _Walk, grid: Grid) -> int:
    """How many elements of the first rows do not fit; a block that goes on below may have any maximum left open."""
    span = slice(0, min(walk.case.rows, max(1, PROBE_ELEMENTS // max(1, int(walk.case.base.shape[1])))))
    low, high = _maxima(walk, grid, iter((span,)))
    high[grid.blocks.whole(span.stop) :] = torch.inf
    outside = _Codes(walk, grid).outside(span, grid.blocks.of(span), grid.scales.divisors(low, high))
    return int(outside.sum().item())


# ----------------------------------------------------------------------------------------------------- through


def through(case: Case, grid: Grid, actual: Tensor, orders: Sequence[Arithmetic]) -> Found | None:
    """The first arithmetic whose honest merge, quantised as the base is and decoded again, can be this tensor.

    grid     of the base: its blocks, its levels and its kind of scale
    actual   (rows, columns), in the storage dtype of the case
    """
    if not _has_levels(grid, actual):
        return None
    likely = [one for one in grid.anew if all(_decodes(_honest(replace(case, storage=one), ANY), grid, actual))]
    ways = list(_ways(case, likely, orders))
    for make in (_written, _honest):
        for way in ways:
            walk = make(*way)
            if all(_decodes(walk, grid, actual)):
                return Found(way[1], 0, walk.exact, 0, _width(walk, grid))
    return None


def _width(walk: _Walk, grid: Grid) -> float:
    """The scales that a merge is quantised to leave each element open by no more than the largest level's share."""
    low, high = grid.scales.remade(*_maxima(walk, grid, tiles(walk.case)))
    sizes = torch.zeros_like(low)
    for span in tiles(walk.case):
        blocks = grid.blocks.of(span).flatten()
        sizes.index_add_(0, blocks, torch.ones_like(blocks, dtype=sizes.dtype))
    return float((((high - low) / 2).square() * sizes).sum().item())


def _has_levels(grid: Grid, actual: Tensor) -> bool:
    """Whether the first block holds no more different numbers than there are levels."""
    rows = next(row for row in range(1, len(actual) + 1) if grid.blocks.whole(row))
    first = actual[:rows][grid.blocks.of(slice(0, rows)) == 0]
    return len(set(first.tolist())) <= len(set(grid.levels.tolist()))


def _decodes(walk: _Walk, grid: Grid, actual: Tensor) -> Iterator[bool]:
    """Tile by tile, whether each element can be a level times a scale that the merge was quantised to."""
    maxima = _maxima(walk, grid, tiles(walk.case))
    scales, (low, high) = grid.scales.remade(*maxima), grid.scales.anew(*maxima)
    order = grid.levels.argsort()[: int(grid.levels.isfinite().sum().item())]
    ends, levels = [end[order] for end in (grid.least, grid.largest)], grid.levels[order]
    for span in tiles(walk.case):
        blocks, (least, largest) = grid.blocks.of(span), walk.rows(span)
        first = torch.searchsorted(ends[1], torch.minimum(least / low[blocks], least / high[blocks]))
        last = torch.searchsorted(ends[0], torch.maximum(largest / low[blocks], largest / high[blocks]), right=True) - 1
        stored = cell(actual[span], name_of(actual.dtype))
        chosen = [levels[code.clamp(0, len(levels) - 1)] for code in (first, last)]
        hits = [_meets(level, scales, blocks, walk.case, stored) for level in chosen]
        between = (last - first > 1) | least.isnan() if walk.any else torch.zeros_like(blocks, dtype=torch.bool)
        yield bool((hits[0] | hits[1] | between).all())


def _meets(levels: Tensor, scales: Interval, blocks: Tensor, case: Case, stored: Interval) -> Tensor:
    """Whether a level times a scale, in the dtype it was quantised from, can have been stored as it is."""
    ends = torch.stack([levels * scale[blocks] for scale in scales])
    off = gamma(4, U) * ends.abs().amax(0)
    low, high = (store(end, case.storage) for end in (ends.amin(0) - off, ends.amax(0) + off))
    return (low <= stored[1]) & (stored[0] <= high)
