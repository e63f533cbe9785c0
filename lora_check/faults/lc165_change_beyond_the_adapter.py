"""LC165 change-beyond-the-adapter

What it is
MERGED changed by more than this adapter, and the adapter is what was cut out of that change: its largest directions.
MERGED is no merge of it.

How it happens
An adapter was extracted from a full fine-tune, or from a merge of a higher rank, by a singular value decomposition
(LoRA extraction scripts, kohya's extract_lora, mergekit), and is then given as if it had made MERGED. GaLore, or
a full fine-tune, trained the weights themselves. What the cut left behind is in MERGED and in no adapter.

How it is told
The forward model of a cut: s B A is the truncated decomposition of MERGED - BASE, so what is left of that, R, stands
at right angles to it on both sides, B^T R = 0 and R A^T = 0. R has less in the columns of B, and less in the rows of
A, than directions that have nothing to do with R have once in 2^40 times. An update that was trained and merged beside
the adapter (LC163), and another base (LC404), have their usual share there.

Evidence
held: which share of |MERGED - BASE|^2 the adapter has. rest: its rank, where that is low; "rounding" where it is no
larger than what storing may have left; else "full", as of a full fine-tune. A sample of rows and columns is looked at.

What to do
Ask `infer BASE MERGED` what kind of change it is. Keep MERGED as the model; or extract with a higher rank, merge that,
and check that merge.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_check.faults._avoided import along, is_cut
from lora_check.faults._cases import never
from lora_check.faults._low_rank import energy, ranks_told
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "changed by more than the adapter, which is a cut of the change"


def recognise(case: Case, actual: Tensor) -> Mapping[str, Any] | None:
    """The adapter's share of the change, and the rank of the rest, where the rest avoids all of its directions."""
    both = along(case, actual)
    if both is None or not is_cut(both):
        return None
    down, _ = both
    rest = energy(down.beside.seen)
    of = "rounding" if rest <= energy(down.bound) else down.beside.rank or "full"
    return {"held": round(1 - rest / energy(down.seen), 4), "rest": of}


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'it holds 85 to 97 % of it, and the rest is of rank 3 to 9', or of no low rank, or no larger than rounding."""
    low, high = (round(100 * end(one["held"] for one in told)) for end in (min, max))
    share = f"{low} %" if low == high else f"{low} to {high} %"
    return f"{SUMMARY}: it holds {share} of it, and the rest is {', or '.join(_rests(told))},"


def _rests(told: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    kinds = {one["rest"] for one in told}
    if ranks := [{"rank": one} for one in kinds if isinstance(one, int)]:
        yield ranks_told(ranks).strip()
    if "full" in kinds:
        yield "of no low rank, as of a full fine-tune"
    if "rounding" in kinds:
        yield "no larger than rounding"


FAULT = ValueFault(
    code="LC165",
    name="change-beyond-the-adapter",
    severity="error",
    summary=SUMMARY,
    help="ask `infer BASE MERGED` what kind of change it is; no merge of this adapter gives MERGED",
    inject=never,
    recognise=recognise,
    tell=tell,
    causes=("M41",),
)
