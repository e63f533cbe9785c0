"""Case x Arithmetic -> what an honest merge writes.

The formula of a recipe is walked step by step, over any of `number_kinds`: exact numbers give the expected tensor, a
producer's own its bits, balls the interval that no honest merge leaves. All see rows only; nothing of a tensor is held
but its tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_check.ball import Ball, root, squares
from lora_check.number_kinds import Bounds, Exact, Loose, NumberKind, Written, any_error, dtype_of, load_dtype
from lora_check.rounding import ANY, store
from lora_check.types import Arithmetic, Case, Factors, LoadedStep

TILE_ELEMENTS = 1 << 16
"""Elements of a tile: a quarter of a MiB in float32, so a tile and its temporaries stay in a core's L2 cache."""


def tiles(case: Case, elements: int = TILE_ELEMENTS) -> Iterator[slice]:
    """The row ranges of a case, in file order, of about `elements` elements each."""
    columns = max(1, int(case.base.shape[1]))
    step = max(1, elements // columns)
    for start in range(0, case.rows, step):
        yield slice(start, min(start + step, case.rows))


class Rows(NamedTuple):
    """Some rows of a replay, in one kind of number.

    total   merged rows, just before they are stored
    base    the rows they were made from
    added   the sum of the deltas, before any rounding of theirs; None where the formula does more than add
    """

    total: Any
    base: Any
    added: Any

    @property
    def delta(self) -> Any:
        """merged - base; taken from the formula where that is possible, for the difference may lose it all."""
        return self.total - self.base if self.added is None else self.added


@dataclass(frozen=True, slots=True)
class Replay:
    """A case walked over one kind of number; factors are converted once, column norms gathered once."""

    case: Case
    numbers: Any
    factors: tuple[dict[str, Any], ...]
    norms: tuple[Any, ...]

    def rows(self, span: slice) -> Rows:
        """Walk one row range through every step, stored after each but the last."""
        base = w = found = self.numbers.base(self.case.base[span])
        added, last = None, len(self.case.steps) - 1
        adds = all(step.recipe.adds and not step.window for step in self.case.steps)
        for index, step in enumerate(self.case.steps):
            factors = self.factors[index] | ({"W": found} if step.recipe.reads == "rows" else {})
            w, delta = _windowed(step, w, factors, self.norms[index], span, self.numbers)
            if index < last:
                w = self.numbers.settle(w)
            if step.recipe.loads or step.recipe.copies:
                found = w
            if adds:
                added = delta if added is None else added + delta
        return Rows(w, base, added)


def replay(case: Case, numbers: NumberKind) -> Replay:
    """Make ready to walk `case` over `numbers`: convert and prepare the factors, gather the norms a recipe asks for."""
    ready = Replay(replace(case, steps=()), numbers, (), ())
    for index, step in enumerate(case.steps):
        factors = _convert(step, numbers)
        if step.recipe.prepare is not None:
            assert step.site is not None, step.recipe.name
            factors = {**step.recipe.prepare(factors | _whole(case, index, ready), step.site, numbers)}
        norms = _column_norms(case, step, factors, ready) if step.recipe.columns else None
        ready = Replay(_upto(case, index + 1), numbers, (*ready.factors, factors), (*ready.norms, norms))
    return ready


def expected(case: Case) -> Replay:
    """W' in float64, nothing rounded."""
    return replay(case, Exact())


def written(case: Case, how: Arithmetic) -> Replay:
    """What a producer of this arithmetic holds before its last store."""
    return replay(case, Written(case, how))


def bounds(case: Case, how: Arithmetic) -> Replay:
    """Every value that an honest producer of this arithmetic can hold before its last store."""
    return replay(case, Loose(case) if how is ANY else Bounds(case, how))


def bits(total: Tensor, case: Case, how: Arithmetic) -> Tensor:
    """The last stores of `written` rows: through any dtype on the way, to the dtype of the merged file."""
    return _way(total, case, how).to(dtype_of(case.storage))


def interval(total: Ball, case: Case, how: Arithmetic) -> tuple[Tensor, Tensor]:
    """The least and the largest value that `bounds` rows can have just before the merged file stores them, float64."""
    if how is ANY:
        total = total.widened(*any_error(case))
    low, high = total.mid - total.rad, total.mid + total.rad
    for stop in stops(case, how)[:-1]:
        low, high = store(low, stop), store(high, stop)
    return low, high


def stops(case: Case, how: Arithmetic) -> tuple[str, ...]:
    """The dtypes a finished tensor is stored in, one after the other, the merged file's last."""
    way = (how.through, load_dtype(case, how), case.through, case.storage)
    return tuple(stop for stop, _ in groupby(stop for stop in way if stop))


def _way(total: Tensor, case: Case, how: Arithmetic) -> Tensor:
    for stop in stops(case, how)[:-1]:
        total = total.to(dtype_of(stop))
    return total


def _windowed(
    step: LoadedStep, w: Any, factors: Factors, norms: Any, span: slice, numbers: NumberKind
) -> tuple[Any, Any]:
    """The rows after a step that may touch only some of them, counted from the first that it touches."""
    if step.window is None:
        return _merge(step, w, factors, norms, span, numbers)
    start, stop = max(span.start, step.window[0]), min(span.stop, step.window[1])
    if start >= stop:
        return w, None
    touched, own = slice(start - span.start, stop - span.start), slice(start - step.window[0], stop - step.window[0])
    changed = w.clone()
    changed[touched], _ = _merge(step, w[touched], factors, norms, own, numbers)
    return changed, None


def _merge(step: LoadedStep, w: Any, factors: Factors, norms: Any, span: slice, numbers: NumberKind) -> tuple[Any, Any]:
    """The rows after one step, and its scaled delta before the producer stored it."""
    recipe = step.recipe
    if recipe.replace is not None:
        return recipe.replace(w, factors, span, step.tokens), None
    scaled = _scaled(step, factors, span, numbers)
    delta = None if scaled is None else numbers.delta(scaled, recipe.stored)
    if recipe.apply is None:
        return w + delta, scaled
    return recipe.apply(w, delta, factors, norms, span, numbers), scaled


def _scaled(step: LoadedStep, factors: Factors, span: slice, numbers: NumberKind) -> Any:
    make = step.recipe.flipped if step.flipped else step.recipe.product
    if make is None:
        return None
    product = numbers.product(make(factors, span))
    if step.recipe.scaled is not None and step.scale is not None:
        return step.recipe.scaled(product, step.scale)
    return product * step.s if step.scale and not _prescaled(step, numbers) else product


def _prescaled(step: LoadedStep, numbers: Any) -> str:
    """The factor that the scale was multiplied into, in an arithmetic that does so."""
    how = getattr(numbers, "how", None)
    if how is None or not how.prescaled or step.scale is None or step.recipe.scaled is not None:
        return ""
    return next((role for role in ("embedding_A", "B") if role in step.factors), "")


def _column_norms(case: Case, step: LoadedStep, factors: Factors, before: Replay) -> Any:
    """sqrt of the column sums of squares that a recipe asks for: one pass over the base ahead of the merge."""
    assert step.recipe.columns is not None
    total: Any = 0
    rows: Any = None
    numbers = before.numbers
    for span in tiles(case):
        w = _stored_rows(before, span)
        delta = numbers.delta(_scaled(step, factors, span, numbers), step.recipe.stored)
        rows = step.recipe.columns(w, delta, numbers)
        total = total + squares(rows)
    return root(total, case.rows, rows)


def _whole(case: Case, index: int, before: Replay) -> dict[str, Any]:
    """The whole weight, where the recipe of a step reads it: as its adapter found it, or as those before left it."""
    reads = case.steps[index].recipe.reads
    if reads == "merged":
        return {"W": _stored_rows(before, slice(0, case.rows))}
    return {"W": _as_found(case, index, before)} if reads == "whole" else {}


def _as_found(case: Case, index: int, before: Replay) -> Any:
    """The whole base as the adapter of step `index` found it: loaded, and no adapter merged yet."""
    loaded = [one for one in range(index) if case.steps[one].recipe.loads or case.steps[one].recipe.copies]
    kept = 1 + loaded[-1] if loaded else 0
    found = Replay(_upto(case, kept), before.numbers, before.factors[:kept], before.norms[:kept])
    return _stored_rows(found, slice(0, case.rows))


def _stored_rows(done: Replay, span: slice) -> Any:
    """Rows as they lie in the model after some steps."""
    total = done.rows(span).total
    return done.numbers.settle(total) if done.case.steps else total


def _upto(case: Case, index: int) -> Case:
    return replace(case, steps=case.steps[:index])


def _convert(step: LoadedStep, numbers: Any) -> dict[str, Any]:
    plain = step.recipe.elementwise
    scaled = _prescaled(step, numbers)

    def converted(role: str, tensor: Tensor) -> Any:
        """As this kind of number has it, now or row by row."""
        if role in step.recipe.carried:
            return _Carried(tensor, numbers, role not in plain)
        return numbers.prescaled(tensor, step.s) if role == scaled else numbers.factor(tensor, role not in plain)

    factors = {role: converted(role, tensor) for role, tensor in step.factors.items()}
    return factors | {role: numbers.base(tensor) for role, tensor in step.companions.items()}


@dataclass(frozen=True, slots=True)
class _Carried:
    """A tensor that takes the place of the base: only the rows that are asked for are converted."""

    stored: Tensor
    numbers: Any
    multiplied: bool

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    def reshape(self, *shape: int) -> _Carried:
        return replace(self, stored=self.stored.reshape(*shape))

    def __getitem__(self, rows: slice) -> Any:
        return self.numbers.factor(self.stored[rows], self.multiplied)
