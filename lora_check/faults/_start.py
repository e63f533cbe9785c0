"""The start of a training that begins with a part of the base, s B0 A0: what the faults of such adapters share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_check.faults._avoided import LONGEST, along, avoids, span
from lora_check.faults._low_rank import SAMPLE, energy, spaces
from lora_check.types import Case, LoadedStep

if TYPE_CHECKING:
    from torch import Tensor

RECIPES = ("lora-linear", "lora-linear-in-out")


def halves(case: Case) -> tuple[LoadedStep, LoadedStep] | None:
    """s B A and - s B0 A0 of a converted adapter, B' = [B, -B0] and A' = [A; A0], where this may be one.

    It may be one if the columns of the second half of B stand at right angles, as a start of these methods has them.
    """
    if len(case.steps) != 1 or case.steps[0].recipe.name not in RECIPES:
        return None
    (step,) = case.steps
    half, odd = divmod(int(step.factors["A"].shape[0]), 2)
    if half < 2 or odd or not _orthogonal(step.factors["B"][:, half:]):
        return None
    return part(step, slice(0, half)), part(step, slice(half, 2 * half))


def part(step: LoadedStep, ranks: slice) -> LoadedStep:
    """The same step with some of its ranks."""
    return replace(step, factors={"A": step.factors["A"][ranks], "B": step.factors["B"][:, ranks]})


def _orthogonal(columns: Tensor) -> bool:
    """Whether columns stand at right angles, as a decomposition in float32 leaves them and storage rounds them."""
    import torch

    from lora_check.rounding import FORMATS, backward, unit

    dtype = str(columns.dtype).removeprefix("torch.")
    wide = columns.to(torch.float64)
    lengths = torch.linalg.vector_norm(wide, dim=0)
    if dtype not in FORMATS or not bool((lengths > 0).all()):
        return False
    angles = (wide / lengths).T @ (wide / lengths)
    reach = backward(max(columns.shape), unit("float32")) + 2 * unit(dtype)
    return bool((angles - torch.eye(len(lengths), dtype=torch.float64)).abs().max() <= reach)


def has_lost(case: Case, step: LoadedStep) -> bool:
    """Whether BASE avoids the columns of B: a start that lay in them was taken off it already."""
    import torch

    b = step.factors.get("B")
    if step.recipe.name not in RECIPES or b is None or max(case.base.shape) > LONGEST:
        return False
    rows, columns = (slice(None, None, -(-int(size) // SAMPLE)) for size in case.base.shape)
    some = case.base[:, columns] if step.recipe.name == RECIPES[0] else case.base[rows].T
    return avoids(some.to(torch.float32), torch.linalg.qr(b.to(torch.float32)).Q)


def lost(case: Case, actual: Tensor) -> dict[str, Any] | None:
    """Which of BASE and MERGED lost a start that is in no adapter at hand, and its rank; None: none was lost.

    The factors began at the start, so that s B A still lies mostly along it. What was cut out of a weight is larger
    than a mean direction of what it left, and that avoids it.
    """
    from lora_check.rounding import MOST

    plain = replace(case, steps=tuple(step for step in case.steps if not step.recipe.loads))
    if any(step.recipe.name not in RECIPES for step in plain.steps) or (both := along(plain, actual)) is None:
        return None
    one = both[plain.steps[0].recipe.name != RECIPES[0]]
    beside = one.beside
    if (rank := beside.rank) is None or spaces(beside).columns < MOST:
        return None
    added = float((beside.seen * one.asked).sum()) > 0
    rest = one.base if added else one.base + beside.seen
    large = energy(beside.seen) / rank > energy(rest) / min(one.shape)
    if not large or not avoids(rest, span(beside.seen, rank)):
        return None
    return {"residual": "BASE" if added else "MERGED", "ranks": rank}
