"""W' = W + s L R, stored once: what most recipes of most models come to, and what can be recomputed fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_check.exclusion import factors_of
from lora_check.number_kinds import dtype_of, name_of, stores_delta
from lora_check.replay import stops
from lora_check.types import Arithmetic, Case, LoadedStep

WIDE_ENOUGH = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A case and an arithmetic that come to W + s L R in float32, base and result in one dtype.

    left, right   (rows, r) and (r, columns): the two factors as the product sees them, in the dtype they are stored in
    rounded       s L R is stored in that dtype before the sum
    narrowed      so are L and R before the product
    """

    left: Tensor
    right: Tensor
    s: float
    dtype: torch.dtype
    rounded: bool
    narrowed: bool

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])

    def stored(self, factor: Tensor) -> Tensor:
        """A factor, or rows of one, as this arithmetic has it before it computes with it."""
        return factor.to(self.dtype) if self.narrowed else factor

    def lefts(self, rows: Any) -> Tensor:
        """Some rows of L, as this arithmetic multiplies them: (those rows, r), float32, a copy."""
        return self._loaded(self.left[rows])

    def rights(self) -> Tensor:
        """R, as this arithmetic multiplies it: (r, columns), float32, a copy."""
        return self._loaded(self.right)

    def _loaded(self, factor: Tensor) -> Tensor:
        # A copy of its own: matrix products differ in their last bit with the alignment of a mapped file's pages.
        return self.stored(factor).to(torch.float32, copy=True)


def plain(case: Case, how: Arithmetic) -> Plain | None:
    """The case as W + s L R, if under this arithmetic it is no more than that."""
    if len(case.steps) != 1 or case.grid is not None or how.product or how.prescaled or how.compute != "float32":
        return None
    step, kind = case.steps[0], name_of(case.base.dtype)
    if factors_of(step) is None or step.window or kind not in WIDE_ENOUGH or stops(case, how) != (kind,):
        return None
    left, right = _operands(step, case.rows)
    if (left.shape[0], right.shape[1]) != tuple(case.base.shape):
        return None
    if not (left.is_floating_point() and right.is_floating_point()):
        return None
    return Plain(
        left=left,
        right=right,
        s=step.s,
        dtype=dtype_of(kind),
        rounded=kind != "float32" and stores_delta(how, step.recipe.stored),
        narrowed=how.factors == "storage",
    )


def gathered(case: Case, seen: Plain, rows: Tensor, columns: Tensor, base: Tensor) -> Case:
    """A case of single elements of a plain one, as many rows of one column.

    rows, columns   (n,) int64: where they lie          base   (n,): their base
    """
    step = case.steps[0]
    factors = {"A": seen.right[:, columns], "B": seen.left[rows]}
    recipe = replace(step.recipe, product=_each, flipped=None)
    return Case(
        base=base.reshape(-1, 1),
        steps=(replace(step, recipe=recipe, factors=factors, flipped=False),),
        storage=case.storage,
    )


def _each(factors: Mapping[str, Any], rows: slice) -> Any:
    """<B[n, :], A[:, n]> for each n.   A (r, n), B (n, r)."""
    rank = int(factors["A"].shape[0])
    return (factors["B"][rows].reshape(-1, 1, rank) @ factors["A"].T[rows].reshape(-1, rank, 1)).reshape(-1, 1)


@dataclass(frozen=True, slots=True)
class _Operand:
    """A factor that is looked at from another side, until it is multiplied: a product of two gives the two."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def T(self) -> _Operand:  # noqa: N802  the name that Tensor has
        return _Operand(self.tensor.T)

    def __getitem__(self, index: Any) -> _Operand:
        return _Operand(self.tensor[index])

    def reshape(self, *shape: int) -> _Operand:
        return _Operand(self.tensor.reshape(*shape))

    def __matmul__(self, other: _Operand) -> tuple[Tensor, Tensor]:
        return self.tensor, other.tensor


def _operands(step: LoadedStep, rows: int) -> tuple[Tensor, Tensor]:
    """L and R, for all rows."""
    make = step.recipe.flipped if step.flipped else step.recipe.product
    assert make is not None, step.recipe.name
    left, right = make({role: _Operand(factor) for role, factor in step.factors.items()}, slice(0, rows))
    return left, right
