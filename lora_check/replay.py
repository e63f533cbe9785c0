"""Case x Arithmetic -> what an honest merge writes.

The formula of a recipe is walked once, over three kinds of numbers:

    Exact     float64, nothing rounded            the expected tensor
    Written   the producer's dtypes and roundings  the very bits, when the producer ran this arithmetic
    Bounds    balls                                the interval no honest merge of this arithmetic leaves

All three see rows only; nothing of a tensor is held but its tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_check.ball import Ball, root, squares
from lora_check.rounding import ANY, FORMATS, TF32_UNIT, any_rounding, store, unit
from lora_check.types import Arithmetic, Case, Factors, LoadedStep

TILE_ELEMENTS = 1 << 16
"""Elements of a tile: a quarter of a MiB in float32, so a tile and its temporaries stay in a core's L2 cache."""


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """The name of a torch dtype, without the prefix."""
    return str(dtype).removeprefix("torch.")


def tiles(case: Case, elements: int = TILE_ELEMENTS) -> Iterator[slice]:
    """The row ranges of a case, in file order, of about `elements` elements each."""
    columns = max(1, int(case.base.shape[1]))
    step = max(1, elements // columns)
    for start in range(0, case.rows, step):
        yield slice(start, min(start + step, case.rows))


class _Numbers(Protocol):
    """How a kind of number is loaded, and where it is rounded."""

    def base(self, rows: Tensor) -> Any: ...
    def factor(self, stored: Tensor) -> Any: ...
    def product(self, x: Any) -> Any: ...
    def delta(self, x: Any, layer_stores: bool) -> Any: ...
    def keep(self, x: Any) -> Any: ...
    def settle(self, x: Any) -> Any: ...


class Exact:
    """float64, nothing rounded."""

    def base(self, rows: Tensor) -> Tensor:
        return rows.to(torch.float64)

    factor = base

    def product(self, x: Tensor) -> Tensor:
        return x

    def delta(self, x: Tensor, layer_stores: bool) -> Tensor:
        return x

    keep = settle = product


class Written:
    """The dtypes and roundings of one arithmetic, operation by operation as torch performs them."""

    def __init__(self, case: Case, how: Arithmetic) -> None:
        self.how, self.load = how, dtype_of(load_dtype(case, how))
        self.compute = dtype_of(how.compute)
        self.sums = torch.promote_types(self.compute, self.load)

    def base(self, rows: Tensor) -> Tensor:
        return rows.to(self.load).to(self.sums)

    def factor(self, stored: Tensor) -> Tensor:
        # A copy of its own: matrix products differ in their last bit with the alignment of a mapped file's pages.
        rounded = stored.to(self.load) if self.how.factors == "storage" else stored
        return rounded.to(self.compute, copy=True)

    def product(self, x: Tensor) -> Tensor:
        return self._stored(x) if self.how.product else x

    def delta(self, x: Tensor, layer_stores: bool) -> Tensor:
        return self._stored(x) if _stores_delta(self.how, layer_stores) else x

    def keep(self, x: Tensor) -> Tensor:
        return self._stored(x) if self.how.delta == "always" else x

    def settle(self, x: Tensor) -> Tensor:
        return self._stored(x).to(self.sums)

    def _stored(self, x: Tensor) -> Tensor:
        return x.to(self.load).to(x.dtype)


class Bounds:
    """Balls in the compute dtype, rounded where the arithmetic rounds."""

    def __init__(self, case: Case, how: Arithmetic) -> None:
        self.how, self.load = how, load_dtype(case, how)
        # A float64 sum still reaches a narrow format through float32 in torch, so its unit cannot be smaller.
        wide = how.compute == "float64" and self.load == case.storage == "float64"
        self.u = unit("float64" if wide else "float32")
        self.terms = max((_inner(step) for step in case.steps), default=0) + 2

    def base(self, rows: Tensor) -> Ball:
        ball = Ball.exactly(store(rows.to(torch.float64), self.load), self.u)
        return ball.widened(self.terms * self.u) if self.how.fused else ball

    def factor(self, stored: Tensor) -> Ball:
        ball = Ball.exactly(stored, self.u)
        if self.how.factors == "tf32":
            return ball.widened(TF32_UNIT)
        return ball.stored(self.load) if self.how.factors == "storage" else ball

    def product(self, x: Ball) -> Ball:
        return x.stored(self.load) if self.how.product else x

    def delta(self, x: Ball, layer_stores: bool) -> Ball:
        return x.stored(self.load) if _stores_delta(self.how, layer_stores) else x

    def keep(self, x: Ball) -> Ball:
        return x.stored(self.load) if self.how.delta == "always" else x

    def settle(self, x: Ball) -> Ball:
        return x.stored(self.load)


class Loose:
    """Balls that hold for every order at once: wherever one of them rounds, the coarsest rounding of all is allowed."""

    def __init__(self, case: Case) -> None:
        self.u, self.error = unit("float32"), any_rounding(case.storage, name_of(case.base.dtype))

    def base(self, rows: Tensor) -> Ball:
        return Ball.exactly(rows, self.u).widened(*self.error)

    factor = base

    def product(self, x: Ball) -> Ball:
        return x.widened(*self.error)

    def delta(self, x: Ball, layer_stores: bool) -> Ball:
        return x.widened(*self.error)

    keep = settle = product


@dataclass(frozen=True, slots=True)
class Replay:
    """A case walked over one kind of number; factors are converted once, column norms gathered once.

    rows(range)  -> (merged rows before the last store, base rows), in that kind of number
    """

    case: Case
    numbers: Any
    factors: tuple[Factors, ...]
    norms: tuple[Any, ...]

    def rows(self, span: slice) -> tuple[Any, Any]:
        """Walk one row range through every step, stored after each but the last."""
        base = w = self.numbers.base(self.case.base[span])
        last = len(self.case.steps) - 1
        for index, step in enumerate(self.case.steps):
            w = _merge(step, w, self.factors[index], self.norms[index], span, self.numbers)
            if index < last:
                w = self.numbers.settle(w)
        return w, base


def replay(case: Case, numbers: _Numbers) -> Replay:
    """Make ready to walk `case` over `numbers`: convert the factors, gather the column norms a recipe asks for."""
    factors = tuple(_convert(step.factors, numbers) for step in case.steps)
    norms: list[Any] = []
    for index, step in enumerate(case.steps):
        norms.append(_column_norms(case, index, factors, tuple(norms), numbers) if step.recipe.columns else None)
    return Replay(case, numbers, factors, tuple(norms))


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
        total = total.widened(*any_rounding(case.storage, name_of(case.base.dtype)))
    low, high = total.mid - total.rad, total.mid + total.rad
    for stop in stops(case, how)[:-1]:
        low, high = store(low, stop), store(high, stop)
    return low, high


def stops(case: Case, how: Arithmetic) -> tuple[str, ...]:
    """The dtypes a finished tensor is stored in, one after the other, the merged file's last."""
    way = (load_dtype(case, how), how.through, case.through, case.storage)
    return tuple(stop for stop in way if stop) if how.load == "base" else tuple(s for s in way[1:] if s)


def load_dtype(case: Case, how: Arithmetic) -> str:
    """The dtype of the model while it was merged."""
    return name_of(case.base.dtype) if how.load == "base" else case.storage


def _way(total: Tensor, case: Case, how: Arithmetic) -> Tensor:
    for stop in stops(case, how)[:-1]:
        total = total.to(dtype_of(stop))
    return total


def _merge(step: LoadedStep, w: Any, factors: Factors, norms: Any, span: slice, numbers: _Numbers) -> Any:
    recipe = step.recipe
    if recipe.replace is not None:
        return recipe.replace(w, factors, span, step.tokens)
    delta = _delta(step, factors, span, numbers)
    if recipe.apply is None:
        return w + delta
    return recipe.apply(w, delta, factors, norms, span, numbers.keep)


def _delta(step: LoadedStep, factors: Factors, span: slice, numbers: _Numbers) -> Any:
    make = step.recipe.flipped if step.flipped else step.recipe.product
    assert make is not None, step.recipe.name
    scaled = numbers.product(make(factors, span)) * step.s
    return numbers.delta(scaled, step.recipe.stored)


def _column_norms(
    case: Case, index: int, factors: tuple[Factors, ...], norms: tuple[Any, ...], numbers: _Numbers
) -> Any:
    """sqrt of the column sums of squares that recipe `index` asks for: one pass over the base ahead of the merge."""
    step, before = case.steps[index], Replay(_upto(case, index), numbers, factors[:index], norms)
    assert step.recipe.columns is not None
    total: Any = 0
    rows: Any = None
    for span in tiles(case):
        w = numbers.settle(before.rows(span)[0]) if index else numbers.base(case.base[span])
        rows = step.recipe.columns(w, _delta(step, factors[index], span, numbers), numbers.keep)
        total = total + squares(rows)
    return root(total, case.rows, rows)


def _upto(case: Case, index: int) -> Case:
    return Case(base=case.base, steps=case.steps[:index], storage=case.storage)


def _convert(factors: Mapping[str, Tensor], numbers: _Numbers) -> Factors:
    return {role: numbers.factor(tensor) for role, tensor in factors.items()}


def _stores_delta(how: Arithmetic, layer_stores: bool) -> bool:
    return how.delta == "always" or (how.delta == "layer" and layer_stores)


def _inner(step: LoadedStep) -> int:
    return max((int(t.shape[0]) for role, t in step.factors.items() if role == "A"), default=1)


__all__ = ["FORMATS", "Replay", "bits", "bounds", "expected", "interval", "tiles", "written"]
