"""Rows of a tensor under one arithmetic: what was seen of them, and what that makes of the whole.

A tensor that an honest merge of the likeliest arithmetic can have written is verified here, and nothing else is: what
this arithmetic cannot have written, NaN, infinity, and the base itself want a closer look.

exact   every stored bit is one that the named arithmetic, performed here, gives; in which order a library sums up the
        products is no part of an arithmetic (`reference` says more)

Elements that differ from what was made here are made once more, literally. What then still differs is not exact, and is
asked element by element whether it lies within the budget: balls, float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import fsum, inf, isfinite
from typing import Any

import torch
from torch import Tensor

from lora_check.device import CPU, agreed
from lora_check.exclusion import excluded
from lora_check.measure import Measure, Sums
from lora_check.plain import Plain, gathered, plain
from lora_check.reference import STRIP_ELEMENTS, Narrow, Wide, narrow, spans
from lora_check.replay import TILE_ELEMENTS, bits, written
from lora_check.same import apart, same_bits, suspicious
from lora_check.sampled import Sampled
from lora_check.trial import Trial
from lora_check.types import Arithmetic, Case

PROBE_ELEMENTS = 1 << 12
"""Elements of the first, smallest tile that a hypothesis is tried on."""

GATHERED_NUMBERS = 1 << 20
"""Numbers of both factors that single elements are asked with in one go: 8 MiB in float64."""

CHUNK_ELEMENTS = 1 << 18
"""Elements that are looked at in one go: half a MiB in 16 bits, so they are read from memory once."""

MANY = 1 << 10
"""Elements that are noted before they are asked about."""

FEW = 8
"""Elements that differ are asked one by one while they are less than one in so many; more are asked as rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What the first pass saw in a range of rows: plain numbers, which can be sent and written down.

    exact     the very bits of the arithmetic          unmoved   and they are those of the base
    signal    |delta|^2, of all rows                   cross     <residual, delta>          noise   |residual|^2
    width     the squared half-widths of the intervals of all rows that are not exact

    Of a large tensor whose formula only adds one product, cross and noise are measured on a fixed sample of its rows,
    and told of all of them (`sampled`). They are evidence; the verdict, `exact` and `unmoved` are of every element.
    """

    exact: bool
    unmoved: bool
    signal: float
    cross: float
    noise: float
    width: float


class Closer(Enum):
    """Why rows want a closer look: this arithmetic has not written them, or none has."""

    UNDECIDED = "undecided"
    EXCLUDED = "excluded"


def part(case: Case, actual: Any, how: Arithmetic, rows: slice, device: str = CPU) -> Part | None:
    """What is seen in some rows, or None: they want a closer look.

    actual   (rows, columns), in the storage dtype; it and the case's base may be sources of rows
    device   where a plain case is made and compared first; what it does not prove is looked at here
    """
    seen = look(case, actual, how, rows, device)
    return seen if isinstance(seen, Part) else None


def whole(parts: Sequence[Part | None], how: Arithmetic) -> Measure | None:
    """A tensor of which these are all the rows; None: it is the base itself, or wants a closer look.

    The sums do not depend on the order in which the parts were seen.
    """
    seen = [one for one in parts if one is not None]
    if len(seen) < len(parts) or all(one.unmoved for one in seen):
        return None
    sums = (fsum(getattr(one, name) for one in seen) for name in ("signal", "cross", "noise", "width"))
    signal, cross, noise, width = sums
    exact = all(one.exact for one in seen)
    if not (exact or width < signal):
        return None
    return Measure(fits=True, exact=exact, arithmetic=how.name, signal=signal, overlap=signal + cross, noise=noise)


def copy_part(case: Case, actual: Any, rows: slice) -> bool:
    """Whether some rows of a bystander hold the bytes of the base, in a tensor of one dtype with it."""
    if case.base.dtype != actual.dtype:
        return False
    return all(same_bits(case.base[span], actual[span]) for span in spans(rows, _columns(case), STRIP_ELEMENTS))


def look(case: Case, actual: Any, how: Arithmetic, rows: slice, device: str = CPU) -> Part | Closer:
    """What is seen in some rows under one arithmetic, or why they want a closer look."""
    simple = plain(case, how)
    seen = _walk(case, actual, how, rows) if simple is None else _Look(case, simple, actual, how, rows).seen(device)
    if isinstance(seen, Part) and not all(map(isfinite, (seen.signal, seen.cross, seen.noise, seen.width))):
        return Closer.UNDECIDED
    return seen


def is_excluded(case: Case, actual: Any, span: slice) -> bool:
    """Whether the first of some rows show that no order at all can have written them."""
    rows = max(1, PROBE_ELEMENTS // max(1, _columns(case)))
    probe = slice(span.start, min(span.stop, span.start + rows))
    return excluded(case, actual[probe], probe)


def _columns(case: Case) -> int:
    return int(case.base.shape[1])


def _walk(case: Case, actual: Any, how: Arithmetic, rows: slice) -> Part | Closer:
    """Any formula, literally, tile by tile."""
    producer, trial = written(case, how), None
    sums, exact, unmoved = Sums(), True, True
    for span in spans(rows, _columns(case), TILE_ELEMENTS):
        stored, made = actual[span], producer.rows(span)
        same = bits(made.total, case, how)
        if not same_bits(same, stored):
            exact = False
            trial = trial or Trial(case, how)
            if is_excluded(case, actual, span):
                return Closer.EXCLUDED
            if trial.over(stored, span):
                return Closer.UNDECIDED
        unmoved = unmoved and same_bits(case.base[span].to(same.dtype), stored)
        delta = made.delta.to(made.base.dtype)
        sums.add(delta, stored.to(delta.dtype) - made.base - delta)
    return Part(
        exact=exact,
        unmoved=unmoved,
        signal=sums.signal,
        cross=sums.cross,
        noise=sums.noise,
        width=trial.width if trial else 0.0,
    )


@dataclass(slots=True)
class _Look:
    """A plain case, strip by strip.

    width        of all elements of the chunks that are not exact
    doubts       elements that differ and were not asked about yet: `noted` of them, in chunks of `questioned` elements
    """

    case: Case
    plain: Plain
    actual: Any
    how: Arithmetic
    rows: slice
    exact: bool = True
    unmoved: bool = True
    width: float = 0.0
    wide: Wide = field(init=False)
    narrow: Narrow | None = field(init=False)
    doubts: list[_Doubt] = field(default_factory=list)
    noted: int = 0
    questioned: int = 0

    def __post_init__(self) -> None:
        self.wide = Wide(self.plain, self.case.rows)
        self.narrow = narrow(self.plain, self.rows)

    def seen(self, device: str) -> Part | Closer:
        """What these rows hold, or why they want a closer look."""
        sampled = Sampled(self.plain, self.wide.right, self.rows)
        for span, base, stored, proved in self._strips(device):
            if not proved and (found := self._compared(base, stored, span)):
                return found
            self.unmoved = self.unmoved and same_bits(base, stored)
            sampled.add(base, stored, span)
        if found := self._settled():
            return found
        signal, cross, noise = sampled.told(self.case.base, self.actual)
        return Part(exact=self.exact, unmoved=self.unmoved, signal=signal, cross=cross, noise=noise, width=self.width)

    def _strips(self, device: str) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
        """Strip by strip base, merged rows, and whether a device made the very bits of them."""
        if device != CPU:
            yield from agreed(self.plain, self.case.base, self.actual, self.rows, device)
            return
        for span in spans(self.rows, _columns(self.case), self._maker.strip):
            yield span, self.case.base[span], self.actual[span].contiguous(), False

    @property
    def _maker(self) -> Narrow | Wide:
        return self.narrow or self.wide

    def _compared(self, base: Tensor, stored: Tensor, span: slice) -> Closer | None:
        """What some rows are refused for, if they are."""
        for rows in spans(slice(0, stored.shape[0]), stored.shape[1], self._maker.strip):
            here = slice(span.start + rows.start, span.start + rows.stop)
            if found := self._differs(base[rows], stored[rows], self._maker.made(base[rows], here), here):
                return found
        return None

    def _differs(self, base: Tensor, stored: Tensor, made: Tensor, span: slice) -> Closer | None:
        """What a strip is refused for, if it is; notes where it is not as it was made."""
        places, columns = list[Tensor](), stored.shape[1]
        flushed = self.narrow is not None and self.narrow.may_flush
        height = max(1, CHUNK_ELEMENTS // max(1, columns))
        for chunk in suspicious(made, stored, height * columns, zeros=flushed):
            if not chunk.finite:
                return Closer.UNDECIDED
            rows = slice(chunk.start // columns, chunk.stop // columns)
            seen, same, here = stored[rows], made[rows], slice(span.start + rows.start, span.start + rows.stop)
            if chunk.zero:
                same = self.wide.made(base[rows], here)
            if (chunk.zero or chunk.same) and same_bits(same, seen):
                continue
            differ = apart(same, seen)
            if FEW * differ.numel() <= seen.numel():
                places.append(differ + chunk.start)
                self.questioned += seen.numel()
            elif found := self._judged_as_rows(seen, here):
                return found
        return self._doubted(base, stored, span.start, torch.cat(places)) if places else None

    def _doubted(self, base: Tensor, stored: Tensor, start: int, places: Tensor) -> Closer | None:
        """Note the elements of a strip that differ, and ask about them once they are many."""
        row, column = torch.div(places, stored.shape[1], rounding_mode="floor"), places % stored.shape[1]
        self.doubts.append(_Doubt(row + start, column, base[row, column], stored[row, column]))
        self.noted += places.numel()
        return self._settled() if self.noted > MANY else None

    def _settled(self) -> Closer | None:
        """Ask about the elements noted so far: literally, as long as all is exact, and then by the budget."""
        if not self.doubts:
            return None
        doubt, questioned = _Doubt.together(self.doubts), self.questioned
        self.doubts, self.noted, self.questioned = [], 0, 0
        if self.exact:
            doubt = doubt.less(self.wide)
        widest = 0.0
        for some in doubt.split(max(1, GATHERED_NUMBERS // max(1, 2 * self.plain.rank))):
            reach = self._judged(some)
            if isinstance(reach, Closer):
                return reach
            self.exact, widest = False, max(widest, reach)
        # As wide as the widest that was asked: the others were not, and say nothing in the tensor's favour.
        self.width += questioned * widest**2
        return None

    def _judged(self, doubt: _Doubt) -> Closer | float:
        """How far an honest merge may be from the middle of what it writes, at most, at some elements."""
        small = gathered(self.case, self.plain, doubt.rows, doubt.columns, doubt.base)
        trial, every = Trial(small, self.how), slice(0, len(doubt.rows))
        allowed = trial.allows(doubt.stored.reshape(-1, 1), every).reshape(-1)
        if not bool(allowed.all()):
            row = int(doubt.rows[int(allowed.int().argmin())])
            return _refused(self.case, self.actual, slice(row, self.rows.stop))
        widest: float = trial.reach(every).max().nan_to_num(inf).item()
        return widest

    def _judged_as_rows(self, stored: Tensor, span: slice) -> Closer | None:
        trial = Trial(self.case, self.how)
        for rows in spans(span, stored.shape[1], TILE_ELEMENTS):
            if trial.over(stored[rows.start - span.start : rows.stop - span.start], rows):
                return _refused(self.case, self.actual, rows)
        self.exact, self.width = self.exact and trial.exact, self.width + trial.width
        return None


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Elements that are not as they were made: their places, their base, what is stored, all (n,)."""

    rows: Tensor
    columns: Tensor
    base: Tensor
    stored: Tensor

    @staticmethod
    def together(doubts: Sequence[_Doubt]) -> _Doubt:
        """All of them."""
        parts = [(one.rows, one.columns, one.base, one.stored) for one in doubts]
        return _Doubt(*(torch.cat(same) for same in zip(*parts, strict=True)))

    def less(self, wide: Wide) -> _Doubt:
        """Those that the literal arithmetic makes otherwise, too."""
        made = wide.elements(self.base, self.rows, self.columns)
        return self._only(apart(made, self.stored))

    def split(self, count: int) -> Iterator[_Doubt]:
        """So many at a time."""
        for start in range(0, len(self.rows), count):
            yield self._only(slice(start, start + count))

    def _only(self, which: Any) -> _Doubt:
        rows, columns, base, stored = (one[which] for one in (self.rows, self.columns, self.base, self.stored))
        return _Doubt(rows, columns, base, stored)


def _refused(case: Case, actual: Any, span: slice) -> Closer:
    return Closer.EXCLUDED if is_excluded(case, actual, span) else Closer.UNDECIDED
