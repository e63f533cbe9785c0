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
from lora_check.replay import TILE_ELEMENTS, bits, bounds, interval, name_of, tiles, written
from lora_check.rounding import arithmetics, cell, gamma, store
from lora_check.types import Arithmetic, Case, Grid

Interval = tuple[Tensor, Tensor]


class Found(NamedTuple):
    """How well a case explains codes: the arithmetic, and how many elements it cannot have written.

    exact     the numbers that the arithmetic itself writes lie in the cells of all codes
    strange   how many blocks have a scale that follows no known rule
    """

    arithmetic: Arithmetic
    over: int
    exact: bool
    strange: int


def judge(case: Case, grid: Grid, orders: Sequence[Arithmetic]) -> Found:
    """The first arithmetic whose honest merges can have become these codes; if none, the first, and how it fails."""
    ways = list(_ways(case, grid.dtypes, orders))
    alive = [way for way in ways if _probe(_Codes(_honest(*way), grid))]
    for make in (_written, _honest):
        for way in alive:
            seen = _Codes(make(*way), grid)
            if not seen.over(stop=True):
                return Found(way[1], 0, seen.walk.exact, seen.strange)
    first = _Codes(_honest(*ways[0]), grid)
    return Found(ways[0][1], first.over(), exact=False, strange=first.strange)


def fits(case: Case, grid: Grid, orders: Sequence[Arithmetic]) -> Found | None:
    """The same, for a case that is only asked whether it explains the codes; strange scales explain nothing."""
    found = judge(case, grid, orders)
    return found if not found.over and not found.strange else None


def reach(grid: Grid, span: slice) -> Tensor:
    """How far each number may lie from the one that its code stands for; the stored scales are taken as they are."""
    codes, blocks = grid.codes[span].long(), grid.blocks.of(span)
    endless = torch.full((grid.blocks.count,), torch.inf, dtype=torch.float64)
    divisors = [one[blocks] for one in grid.scales.divisors(torch.zeros_like(endless), endless)]
    level, ends = grid.levels[codes], (grid.least[codes], grid.largest[codes])
    gaps = [(end - level).abs() * divisor for end in ends for divisor in divisors]
    return torch.stack(gaps).amax(0)


# ------------------------------------------------------------------------------------------------------- walks


@dataclass(frozen=True, slots=True)
class _Walk:
    """Rows of a case -> the least and the largest number that is quantised."""

    case: Case
    rows: Callable[[slice], Interval]
    exact: bool


def _ways(case: Case, dtypes: Sequence[str], orders: Sequence[Arithmetic]) -> Iterator[tuple[Case, Arithmetic]]:
    """Every dtype that the numbers may have had, in every order of operations."""
    others = any(step.recipe.method for step in case.steps)
    for storage in dtypes:
        same = storage == case.storage
        for how in orders if same else arithmetics(storage, name_of(case.base.dtype), others=others):
            yield replace(case, storage=storage), how


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

    return _Walk(case, rows, exact=False)


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
    """Stored codes and scales against one walk."""

    walk: _Walk
    grid: Grid
    strange: int = 0

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
        return ~((low <= torch.maximum(ends[2], ends[3])) & (torch.minimum(ends[0], ends[1]) <= high))


def _probe(codes: _Codes) -> bool:
    """Whether the first rows fit; a block that goes on below them may have any maximum that they leave open."""
    case, grid = codes.walk.case, codes.grid
    span = slice(0, min(case.rows, max(1, TILE_ELEMENTS // max(1, int(case.base.shape[1])))))
    low, high = _maxima(codes.walk, grid, iter((span,)))
    high[grid.blocks.whole(span.stop) :] = torch.inf
    return not bool(codes.outside(span, grid.blocks.of(span), grid.scales.divisors(low, high)).any())


# ----------------------------------------------------------------------------------------------------- through


def through(case: Case, grid: Grid, actual: Tensor, orders: Sequence[Arithmetic]) -> Found | None:
    """The first arithmetic whose honest merge, quantised as the base is and decoded again, can be this tensor.

    grid     of the base: its blocks, its levels and its kind of scale
    actual   (rows, columns), in the storage dtype of the case
    """
    ways = list(_ways(case, grid.anew, orders))
    for make in (_written, _honest):
        for way in ways:
            walk = make(*way)
            if all(_decodes(walk, grid, actual)):
                return Found(way[1], 0, walk.exact, 0)
    return None


def _decodes(walk: _Walk, grid: Grid, actual: Tensor) -> Iterator[bool]:
    """Tile by tile, whether each element can be a level times a scale that the merge was quantised to."""
    low, high = _maxima(walk, grid, tiles(walk.case))
    scales = grid.scales.remade(low, high)
    order = grid.levels.argsort()
    ends, levels = [end[order] for end in (grid.least, grid.largest)], grid.levels[order]
    for span in tiles(walk.case):
        blocks, (least, largest) = grid.blocks.of(span), walk.rows(span)
        first = torch.searchsorted(ends[1], torch.minimum(least / low[blocks], least / high[blocks]))
        last = torch.searchsorted(ends[0], torch.maximum(largest / low[blocks], largest / high[blocks]), right=True) - 1
        stored = cell(actual[span], name_of(actual.dtype))
        chosen = [levels[code.clamp(0, len(levels) - 1)] for code in (first, last)]
        hits = [_meets(level, scales, blocks, walk.case, stored) for level in chosen]
        yield bool((hits[0] | hits[1]).all())


def _meets(levels: Tensor, scales: Interval, blocks: Tensor, case: Case, stored: Interval) -> Tensor:
    """Whether a level times a scale, in the dtype it was quantised from, can have been stored as it is."""
    ends = torch.stack([levels * scale[blocks] for scale in scales])
    off = gamma(4, U) * ends.abs().amax(0)
    low, high = (store(end, case.storage) for end in (ends.amin(0) - off, ends.amax(0) + off))
    return (low <= stored[1]) & (stored[0] <= high)
