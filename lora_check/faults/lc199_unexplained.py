"""LC199 unexplained

What it is
The tensor is not what base and adapter give, and no mistake known here writes these numbers.

How it happens
Another base was merged (see LC404), or another adapter whose update is lost in rounding (see LC162).
Two mistakes were made at once, or the tensor was changed after the merge: trained on, quantised, permuted.

How it is told
By elimination: every mistake with a code was replayed on this tensor, and none reproduced it. Of many such tensors
a part is asked about every mistake, the rest about those found elsewhere in the model; the message says how many.

Evidence
over_budget: elements of the worst tensor that no honest merge can have written. times_budget: the largest
miss, in budgets of its element. residual_over_delta: the whole miss against the delta. survival: near 0
another adapter was merged, near 1 the right one on a changed base, near -1 BASE and MERGED may be swapped.

What to do
Check that BASE, ADAPTER and MERGED belong to the same run, then merge again and compare.

Seen in
huggingface/peft#1135, huggingface/peft#788, thinking-machines-lab/tinker-cookbook#527,
unslothai/unsloth#6930
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_check.faults._cases import never
from lora_check.types import ValueFault


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """How many of the tensors were asked about every mistake, where that is not all."""
    in_full = sum(one.get("in_full", True) for one in told)
    asked = f" ({in_full} of {len(told)} were asked about every one)" if in_full < len(told) else ""
    return f"{FAULT.summary}{asked}"


FAULT = ValueFault(
    code="LC199",
    name="unexplained",
    severity="error",
    summary="numbers that no known mistake explains",
    help="check that BASE, ADAPTER and MERGED belong to the same run",
    inject=never,
    tell=tell,
    kinds=("target", "copy"),
    causes=("M41",),
)
