"""merged - s B A, rows by rows, and how far it may be off: what is left of the base that a merge began with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_check.types import Case

if TYPE_CHECKING:
    from torch import Tensor

ELEMENTS = 1 << 16
"""Elements of the rows that are looked at together."""

FIRST = 1 << 12
"""Elements of the rows that are looked at first."""

SPANS = 16
"""So many times are rows looked at, spread over the tensor: its verdict is out, and only the name is in question."""


class Residual(NamedTuple):
    """Rows of merged - s B A with their room, beside those of MERGED, of BASE and of s B A; all float64.

    off   how far BASE may lie from what was rounded to its dtype
    """

    rows: slice
    seen: Tensor
    left: Tensor
    room: Tensor
    base: Tensor
    delta: Tensor
    off: Tensor

    @property
    def error(self) -> Tensor:
        """How far what is left lies from BASE."""
        return self.left - self.base


def additive(case: Case) -> bool:
    """Whether the merge is a sum, of BASE and of LoRA factors that are multiplied as they lie."""
    return all(
        step.recipe.adds
        and not (step.recipe.method or step.recipe.prepare or step.recipe.scaled or step.window)
        and all(factor.is_floating_point() for factor in step.factors.values())
        for step in case.steps
    )


def delta_of(case: Case, rows: slice) -> tuple[Any, Any]:
    """Rows of the sum of s B A over the steps of an additive case, and of |s| |B| |A|; float64, 0 without a step."""
    import torch

    delta: Any = 0
    size: Any = 0
    for step in case.steps:
        assert step.recipe.product is not None
        factors = {role: one.to(torch.float64) for role, one in step.factors.items()}
        delta = delta + step.recipe.product(factors, rows) * step.s
        size = size + step.recipe.product({role: one.abs() for role, one in factors.items()}, rows) * abs(step.s)
    return delta, size


def residuals(case: Case, actual: Tensor) -> Iterator[Residual]:
    """Some rows after the other, as `parts` has them."""
    return (_residual(case, actual, rows) for rows in parts(case))


def parts(case: Case) -> Iterator[slice]:
    """Rows from all parts of the tensor; a few first, which settle most questions."""
    step = max(1, ELEMENTS // int(case.base.shape[1]))
    starts = range(0, case.rows, step)
    yield slice(0, min(case.rows, max(1, FIRST // int(case.base.shape[1]))))
    for start in starts[:: max(1, -(-len(starts) // SPANS))]:
        yield slice(start, min(start + step, case.rows))


def _residual(case: Case, actual: Tensor, rows: slice) -> Residual:
    import torch

    from lora_check.rounding import carried, half_cell

    seen, base = actual[rows].to(torch.float64), case.base[rows].to(torch.float64)
    delta, size = (torch.zeros_like(seen) + one for one in delta_of(case, rows))
    kept = str(case.base.dtype).removeprefix("torch.")
    room = carried(seen, size, case.storage, kept)
    return Residual(rows, seen, seen - delta, room, base, delta, half_cell(base, kept))
