"""LC163 update-beside-the-adapter

What it is
This adapter was merged, and BASE and MERGED differ by another low-rank update as well.

How it happens
MERGED holds an earlier stage (SFT under DPO, a style under a subject) that was not given. Or BASE is no untouched
base: an adapter was merged into it and deleted (PEFT's delete_adapter while merged), or it is an earlier export. Or the
training moved the base too, as Delta-LoRA does.

How it is told
merged - expected is of low rank to within its rounding, of a lower rank than merged - base, or merged - base is of a
higher rank than the adapter and mostly in the spaces of both its factors; and part of it lies outside the columns of B
or the rows of A; not all of it outside of both, as what a cut leaves (LC165), and it is no start of the training that
the one has and the other lost (LC168). A sample of 384 rows and columns is looked at. An update that MERGED has more
and one that BASE has more differ by a sign that no file tells: the base of the first merge, given as BASE, verifies
with both adapters in the one case, and with this one alone in the other.

Evidence
rank: of the other update. inside_b, inside_a: which share of it lies in the column space of B, the row space of A.

What to do
Give every adapter in the order of the merges, or the base as it was before any merge.

Seen in
hiyouga/LlamaFactory#3821, hiyouga/LlamaFactory#3395, huggingface/trl#250, huggingface/trl#692, huggingface/peft#3498,
huggingface/peft#3504
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    from lora_check.faults._low_rank import Difference


def recognise(case: Case, actual: Tensor) -> Mapping[str, Any] | None:
    """The rank of merged - expected, and its shares in this adapter's spaces, where it is another adapter's update."""
    one = difference(case, actual)
    if one is None or partly_applied(one):
        return None
    whole, rank = one.rank, one.beside.rank
    left = rank is not None and (whole is None or rank < whole)
    held = whole is not None and holds_own(one, whole) and not is_sparse(one.beside.seen, one.bound, one.ranks)
    if not left and not held:
        return None
    found = spaces(one.beside)

    def again(rows: int, columns: int) -> Difference | None:
        more = difference(case, actual, rows, columns)
        return more.beside if more else None

    if is_own(one.beside, found, again) or is_cut(along(case, actual)) or lost(case, actual):
        return None
    return {**({} if rank is None else {"rank": rank}), **shares(case, found)}


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'another low-rank update of rank 8 merged as well, or in BASE already'."""
    return f"another low-rank update{ranks_told(told)} merged as well, or in BASE already,"


FAULT = ValueFault(
    code="LC163",
    name="update-beside-the-adapter",
    severity="error",
    summary="another low-rank update merged as well, or in BASE already",
    help="give every adapter in the order of the merges, or the base as it was before any merge",
    inject=never,
    recognise=recognise,
    tell=tell,
    causes=("M13", "M59"),
)
