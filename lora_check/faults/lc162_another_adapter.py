"""LC162 another-adapter

What it is
A low-rank update was merged, and it is not this adapter's.

How it happens
Another adapter was active or another folder was given (PEFT's set_adapter, scripts). The adapter is of another step
of the run, was saved in mid-run or overwritten later. Of two stages only the other one was merged (DPO alone, SFT
alone).

How it is told
merged - base is of low rank to within its rounding: singular values above what rounding can have, and no more beside
them than it leaves. Part of it lies outside the columns of B or the rows of A, and taking s B A off leaves a higher
rank: this adapter is not in it, nor a cut of it (LC165); nor is it of a higher rank than this adapter and mostly in the
spaces of both factors (LC163). Rows left alone, moved or mixed are not told so. A sample of
384 rows and columns is looked at.

Evidence
rank: of the update. inside_b, inside_a: which share of it lies in the column space of B, the row space of A. Near
r / n: an unrelated adapter. Mostly inside one of them: another step of one run, or a run from the same start.

What to do
Run the check with the adapter that was merged; --candidate-adapter tries several.

Seen in
huggingface/peft#1135, huggingface/peft#3756, huggingface/peft#788, huggingface/peft#1226, unslothai/unsloth#2009,
hiyouga/LlamaFactory#2588
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._avoided import along, is_cut
from lora_check.faults._cases import never
from lora_check.faults._low_rank import (
    difference,
    holds_own,
    is_own,
    is_sparse,
    partly_applied,
    ranks_told,
    shares,
    spaces,
)
from lora_check.faults._start import lost
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor


def recognise(case: Case, actual: Tensor) -> Mapping[str, Any] | None:
    """The rank of merged - base, and its shares in this adapter's spaces, where it is an update of another one."""
    one = difference(case, actual)
    if one is None or (rank := one.rank) is None or partly_applied(one):
        return None
    left = one.beside.rank
    if (left is not None and left < rank) or is_sparse(one.beside.seen, one.bound, one.ranks):
        return None
    if holds_own(one, rank):
        return None
    found = spaces(one)
    if is_own(one, found, partial(difference, case, actual)) or is_cut(along(case, actual)) or lost(case, actual):
        return None
    return {"rank": rank, **shares(case, found)}


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'another adapter merged in its place, of rank 16'; the run is named where most of the updates share a space."""
    from lora_check.rounding import MOST

    related = sum(max(one.get("inside_a", 0), one.get("inside_b", 0)) > MOST for one in told)
    what = "another step of the same run merged in its place" if 2 * related > len(told) else FAULT.summary
    return f"{what}, an update{ranks_told(told)},"


FAULT = ValueFault(
    code="LC162",
    name="another-adapter",
    severity="error",
    summary="another adapter merged in its place",
    help="run the check with the adapter that was merged, or try several with --candidate-adapter",
    inject=never,
    recognise=recognise,
    tell=tell,
    causes=("M13", "M41"),
)
