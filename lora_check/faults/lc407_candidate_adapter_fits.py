"""LC407 candidate-adapter-fits

What it is
MERGED does not verify with this ADAPTER; the ones named by --candidate-adapter were put in its place.

How it happens
It is told where candidates are given and the report is not verified: the checkpoints of a run, or the adapters of
a project, are asked which of them was merged.

How it is told
Each candidate is checked against the same BASE and MERGED, with the same options, as if it were ADAPTER; of several
adapters it takes the place of one after the other. Only a verified report is a fit. A candidate that cannot be
read, or that is not decided, is none.

Evidence
candidates: of each its location, and its verdict with the tensors verified, or the error.

What to do
Run the check again with the one that fits as ADAPTER. The verdict of this report stays: it is about this ADAPTER.

Seen in
huggingface/peft#1135, huggingface/peft#788, huggingface/peft#3756
"""

from __future__ import annotations

from lora_check.types import Finding, Plan, PlanFault


def detect(plan: Plan) -> tuple[Finding, ...]:
    """None: headers do not show it, the check itself is made again."""
    return ()


FAULT = PlanFault(
    code="LC407",
    name="candidate-adapter-fits",
    severity="info",
    summary="a candidate fits in the place of ADAPTER",
    help="run the check again with the one that fits as ADAPTER",
    detect=detect,
    causes=("M41",),
)
