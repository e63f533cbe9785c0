"""LC416 rows-not-replaced

What it is
Of the rows that the adapter trained, an embedding's or a head's, some are in MERGED and others are not.

How it happens
The base was resized for the new tokens with rows of its own, zeros or the mean of the others, and the adapter's
embedding was not put in place, or only where the old vocabulary is.
A script stops at the last row that the tokenizer knows, or leaves out rows that were trained along.

How it is told
Each row that should not be BASE's is compared, bit for bit, with the adapter's row, with BASE's, with zero and with
the mean of BASE's rows, as transformers makes new ones.

Evidence
What was found -> the rows where it was found.

What to do
Resize the base as in the training, and put the adapter's whole tensor in its place; merge_and_unload() does so.

Seen in
hiyouga/LlamaFactory#3125, hiyouga/LlamaFactory#10186, unslothai/unsloth#1215, huggingface/peft#1689
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_check.faults._cases import never
from lora_check.faults._whole import spans, stands_in, trained
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor


def recognise(case: Case, actual: Tensor) -> Mapping[str, Any] | None:
    """The rows by what they hold, if the rows that are wrong are told as well as those that are right."""
    from lora_check.overlap import OTHER, RIGHT, kinds

    lacks = stands_in(case.base) and (case.resized is None or case.resized.shape[1] != actual.shape[1])
    if lacks or case.grid is not None or actual.shape[1] == 1 or trained(case) != case.steps or not case.steps:
        return None
    rows = kinds(case, actual)
    known = len(case.base if case.resized is None else case.resized)
    if any(kind == OTHER and row < known for row, kind in rows):
        return None
    if case.resized is None and RIGHT not in {kind for _, kind in rows}:
        return None
    return {kind: spans(row for row, other in rows if other == kind) for kind in dict.fromkeys(k for _, k in rows)}


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which rows hold what, if all tensors agree."""
    phrases = {", ".join(f"{rows} {kind}" for kind, rows in one.items()) for one in told}
    return f"trained rows not all replaced: rows {phrases.pop()}" if len(phrases) == 1 else str(FAULT.summary)


FAULT = ValueFault(
    code="LC416",
    name="rows-not-replaced",
    severity="error",
    summary="trained rows not all replaced",
    help="resize the base as in the training, and put the adapter's whole tensor in its place",
    inject=never,
    recognise=recognise,
    tell=tell,
    kinds=("copy",),
    causes=("M29", "M48"),
)
