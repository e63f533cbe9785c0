"""LC406 candidate-base-fits

What it is
MERGED does not verify against BASE; the checkpoints named by --candidate-base were put in its place.

How it happens
It is told where candidates are given and the report is not verified: 'was it the other revision?' is asked of
the files, and not of memory.

How it is told
Each candidate is checked against the same ADAPTER(S) and MERGED, with the same options, as if it were BASE. Only a
verified report is a fit. A candidate that cannot be read, or that is not decided, is none. Several can fit where
their tensors are the same.

Evidence
candidates: of each its location, and its verdict with the tensors verified, or the error.

What to do
Run the check again with the one that fits as BASE. The verdict of this report stays: it is about this BASE.

Seen in
hiyouga/LlamaFactory#6105, unslothai/unsloth#2150, ymcui/Chinese-LLaMA-Alpaca#816
"""

from __future__ import annotations

from lora_check.types import Finding, Plan, PlanFault


def detect(plan: Plan) -> tuple[Finding, ...]:
    """None: headers do not show it, the check itself is made again."""
    return ()


FAULT = PlanFault(
    code="LC406",
    name="candidate-base-fits",
    severity="info",
    summary="a candidate fits in the place of BASE",
    help="run the check again with the one that fits as BASE",
    detect=detect,
    causes=("M04", "M26"),
)
