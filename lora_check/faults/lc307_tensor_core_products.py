"""LC307 tensor-core-products

What it is
Targets that only a merge whose products ran on TF32 tensor cores can have written: right to about three digits of
the delta, and known no better than that.

How it happens
The merge ran on a GPU with torch.backends.cuda.matmul.allow_tf32, as many training scripts set it.
A scale that is off by less than about 0.2 % writes numbers that look the same.

How it is told
No order with exact factors can have written these tensors; with factors rounded to the ten explicit bits of TF32 one
can. Where the other targets of that dtype are exact, LC306 is told beside this.

Evidence
targets: how many there are. of: how many targets were compared.

What to do
Merge on a CPU, or with TF32 off, if the last digits matter.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found
from lora_check.types import Comparison, Finding, PatternFault, Plan

TENSOR_CORES = "tf32"


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every target whose arithmetic is a TF32 one."""
    targets = [one for one in comparisons if one.kind == "target"]
    loose = [one for one in targets if (one.arithmetic or "").startswith(TENSOR_CORES)]
    if not loose:
        return ()
    message = (
        f"products on TF32 tensor cores, or a scale off by less than 0.2 %, in {len(loose)} of {len(targets)} targets"
    )
    return (found(FAULT, message, (one.tensor for one in loose), targets=len(loose), of=len(targets)),)


FAULT = PatternFault(
    code="LC307",
    name="tensor-core-products",
    severity="warning",
    summary="targets known to three digits of their delta only",
    help="merge on a CPU, or with TF32 off, if the last digits matter",
    detect=detect,
)
