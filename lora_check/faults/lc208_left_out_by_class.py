"""LC208 left-out-by-class

What it is
Tensors of BASE that MERGED lacks, and that a model of its class rebuilds, ties to another tensor, or has no place for.

How it happens
A newer release of transformers computes position ids, rotary frequencies or causal masks that an older one had saved; a
tied head is written once, as its embedding; a pooler is dropped by a class that reads every token. A classifier that an
adapter was trained for has no head over words, and its causal base has one.

How it is told
By name and configuration only. The verdict does not suffer: nothing of the fine-tune lies there.

Evidence
left_out: how many there are.

What to do
Nothing, unless another class is meant to load MERGED: then save it from that class.

Seen in
No public report known.
"""

from __future__ import annotations

from lora_check.faults._findings import found, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """Tell the dropped tensors."""
    if not plan.dropped:
        return ()
    message = f"{many(len(plan.dropped), 'tensor')} of BASE left out, as models of this class do"
    return (found(FAULT, message, plan.dropped, left_out=len(plan.dropped)),)


FAULT = PlanFault(
    code="LC208",
    name="left-out-by-class",
    severity="info",
    summary="tensors of BASE that a model of this class rebuilds, ties or has no place for",
    help="save MERGED from another class if these tensors are wanted",
    detect=detect,
    verdict=Verdict.VERIFIED,
)
