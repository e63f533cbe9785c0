"""LC413 saved-module-of-another-step

What it is
A tensor that the adapter carries whole was replaced in MERGED by another state of itself: from another step of its
training, or from a run that began as this one did.

How it happens
The export was made from a checkpoint before the last one, or the adapter was trained further after the merge.
The saved modules lie in a file of their own, and that of another checkpoint was taken.

How it is told
The tensor differs from the adapter's, and what the two have beside BASE points in a common direction, further than
independent numbers do by chance. Tensors of few numbers are not judged.

Evidence
direction: the cosine between what the two have beside BASE.

What to do
Give the adapter of the step that was merged, or merge again with this one.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_check.faults._cases import never
from lora_check.faults._whole import stands_in, trained
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor


def recognise(case: Case, actual: Tensor) -> Mapping[str, Any] | None:
    """How far both moved the same way."""
    from lora_check.fresh import related, sample
    from lora_check.overlap import OTHER, kinds
    from lora_check.rounding import FEWEST

    whole = [step.factors["S"].reshape(actual.shape) for step in trained(case) if "S" in step.factors]
    if len(whole) != 1 or trained(case) != case.steps or case.grid is not None or actual.numel() < FEWEST:
        return None
    if stands_in(case.base) or not any(kind == OTHER for _, kind in kinds(case, actual)):
        return None
    ours, theirs = (_apart(sample(x), sample(case.base)) for x in (actual, whole[0]))
    if not related(ours, theirs):
        return None
    return {"direction": float((ours * theirs).sum() / (ours.norm() * theirs.norm()))}


def _apart(x: Tensor, base: Tensor) -> Tensor:
    """x less its part along the base: what two tensors share with the base makes them no kin of each other."""
    size = base.square().sum()
    return x - (x * base).sum() / size * base if bool(size) else x


FAULT = ValueFault(
    code="LC413",
    name="saved-module-of-another-step",
    severity="error",
    summary="saved module of another training step",
    help="give the adapter of the step that was merged, or merge again with this one",
    inject=never,
    recognise=recognise,
    kinds=("copy",),
    causes=("M03",),
)
