"""The kinds of numbers that a recipe's formula is walked over: how each is loaded, and where it is rounded.

Exact     float64, nothing rounded            the expected tensor
Written   the producer's dtypes and roundings  the very bits, when the producer ran this arithmetic
Bounds    balls                                the interval no honest merge of this arithmetic leaves
Loose     balls                                the same for every arithmetic at once
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lora_check.ball import Ball
from lora_check.rounding import TF32_UNIT, any_rounding, store, unit
from lora_check.types import Arithmetic, Case, LoadedStep


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """The name of a torch dtype, without the prefix."""
    return str(dtype).removeprefix("torch.")


class NumberKind(Protocol):
    """How a kind of number is loaded, and where it is rounded."""

    def base(self, rows: Tensor) -> Any: ...
    def factor(self, stored: Tensor, multiplied: bool) -> Any: ...
    def product(self, x: Any) -> Any: ...
    def delta(self, x: Any, layer_stores: bool) -> Any: ...
    def keep(self, x: Any) -> Any: ...
    def settle(self, x: Any) -> Any: ...
    def combined(self, x: Any) -> Any: ...
    def member(self, x: Any) -> Any: ...


class Exact:
    """float64, nothing rounded."""

    def base(self, rows: Tensor) -> Tensor:
        return rows.to(torch.float64)

    def factor(self, stored: Tensor, multiplied: bool) -> Tensor:
        return _floats(stored, torch.float64)

    def product(self, x: Tensor) -> Tensor:
        return x

    def delta(self, x: Tensor, layer_stores: bool) -> Tensor:
        return x

    keep = settle = combined = member = product


class Written:
    """The dtypes and roundings of one arithmetic, operation by operation as torch performs them."""

    def __init__(self, case: Case, how: Arithmetic) -> None:
        self.how, self.load = how, dtype_of(load_dtype(case, how))
        self.compute = self.load if how.compute == "storage" else dtype_of(how.compute)
        self.sums = torch.promote_types(self.compute, self.load)

    def base(self, rows: Tensor) -> Tensor:
        return rows.to(self.load).to(self.sums)

    def factor(self, stored: Tensor, multiplied: bool) -> Tensor:
        # A copy of its own: matrix products differ in their last bit with the alignment of a mapped file's pages.
        rounded = _floats(stored, self.load) if self.how.factors == "storage" else stored
        return _floats(rounded, self.compute, copy=True)

    def prescaled(self, stored: Tensor, s: float) -> Tensor:
        return (stored.to(torch.float32) * s).to(self.load).to(self.compute)

    def product(self, x: Tensor) -> Tensor:
        return self._stored(x) if self.how.product else x

    def delta(self, x: Tensor, layer_stores: bool) -> Tensor:
        return self._stored(x) if stores_delta(self.how, layer_stores) else x

    def keep(self, x: Tensor) -> Tensor:
        return self._stored(x) if self.how.delta == "always" else x

    def settle(self, x: Tensor) -> Tensor:
        return self._stored(x).to(self.sums)

    def combined(self, x: Tensor) -> Tensor:
        return x if self.how.combined == "kept" else self._stored(x)

    def member(self, x: Tensor) -> Tensor:
        return self._stored(x) if self.how.combined == "products" else x

    def _stored(self, x: Tensor) -> Tensor:
        return x.to(self.load).to(x.dtype)


class Bounds:
    """Balls in the compute dtype, rounded where the arithmetic rounds."""

    def __init__(self, case: Case, how: Arithmetic) -> None:
        self.how, self.load = how, load_dtype(case, how)
        self.rounds = self.load if how.compute == "storage" else None
        # A float64 sum still reaches a narrow format through float32 in torch, so its unit cannot be smaller.
        wide = how.compute == "float64" and self.load == case.storage == "float64"
        self.u = unit("float64" if wide else "float32")
        self.terms = max((_inner(step) for step in case.steps), default=0) + 2

    def base(self, rows: Tensor) -> Ball:
        ball = Ball.exactly(store(rows.to(torch.float64), self.load), self.u, self.rounds)
        return ball.widened(self.terms * self.u) if self.how.fused else ball

    def factor(self, stored: Tensor, multiplied: bool) -> Any:
        if not stored.is_floating_point():
            return stored
        ball = Ball.exactly(stored, self.u, self.rounds)
        if self.how.factors == "tf32":
            return ball.widened(TF32_UNIT) if multiplied else ball
        return ball.stored(self.load) if self.how.factors == "storage" else ball

    def prescaled(self, stored: Tensor, s: float) -> Ball:
        return (Ball.exactly(stored, self.u, self.rounds) * s).stored(self.load)

    def product(self, x: Ball) -> Ball:
        return x.stored(self.load) if self.how.product else x

    def delta(self, x: Ball, layer_stores: bool) -> Ball:
        return x.stored(self.load) if stores_delta(self.how, layer_stores) else x

    def keep(self, x: Ball) -> Ball:
        return x.stored(self.load) if self.how.delta == "always" else x

    def settle(self, x: Ball) -> Ball:
        return x.stored(self.load)

    def combined(self, x: Ball) -> Ball:
        return x if self.how.combined == "kept" else x.stored(self.load)

    def member(self, x: Ball) -> Ball:
        return x.stored(self.load) if self.how.combined == "products" else x


class Loose:
    """Balls that hold for every order at once: wherever one of them rounds, the coarsest rounding of all is allowed."""

    def __init__(self, case: Case) -> None:
        self.u, self.error = unit("float32"), any_error(case)

    def base(self, rows: Tensor) -> Ball:
        return Ball.exactly(rows, self.u).widened(*self.error)

    def factor(self, stored: Tensor, multiplied: bool) -> Any:
        return self.base(stored) if stored.is_floating_point() else stored

    def product(self, x: Ball) -> Ball:
        return x.widened(*self.error)

    def delta(self, x: Ball, layer_stores: bool) -> Ball:
        return x.widened(*self.error)

    keep = settle = combined = member = product


def _floats(stored: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """Converted, if they are numbers to compute with; indices stay integers."""
    return stored.to(dtype, copy=copy) if stored.is_floating_point() else stored


def load_dtype(case: Case, how: Arithmetic) -> str:
    """The dtype of the model while it was merged."""
    if case.held or how.load == "merged":
        return case.held or case.storage
    return name_of(case.base.dtype) if how.load == "base" else how.load


def stores_delta(how: Arithmetic, layer_stores: bool) -> bool:
    """Whether the scaled delta is stored before the sum, in a recipe whose delta PEFT always stores or does not."""
    return how.delta == "always" or (how.delta == "layer" and layer_stores)


def any_error(case: Case) -> tuple[float, float]:
    """The relative and the absolute error that no single rounding of any order exceeds in this case."""
    return any_rounding(case.held or case.storage, name_of(case.base.dtype))


def _inner(step: LoadedStep) -> int:
    """The rank: how many products each element of the delta sums up."""
    return max((int(factor.shape[0]) for role, factor in step.factors.items() if role.endswith("A")), default=1)
