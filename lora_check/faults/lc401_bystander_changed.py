"""LC401 bystander-changed

What it is
A tensor that no adapter touches is not what it is in BASE.

How it happens
A patch of the training code leaked into the save, such as the 1 that some norms add to their weight.
Part of the base was trained along with the adapter, and nobody saved that part in it.
The merge tool computed with a bias or a router and rounded it on the way.

How it is told
A bystander has no budget: it is the base bit for bit, after the conversion to the dtype of MERGED if that
differs.
If more than half of them differ, the base itself is another one (LC404).

Evidence
changed: how many bystanders differ. over_budget: the largest number of elements that differ in one of them.

What to do
Copy these tensors from BASE into MERGED, or find out who trained them.

Seen in
unslothai/unsloth#219, Blaizzy/mlx-vlm#2181, PrimeIntellect-ai/prime-rl#2338
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every changed bystander that no value fault explains."""
    bystanders = [one for one in comparisons if one.kind == "bystander"]
    changed = [one for one in bystanders if one.verdict is Verdict.REFUTED and one.code is None]
    if not changed:
        return ()
    largest = max(one.over_budget for one in changed)
    message = f"{len(changed)} of {many(len(bystanders), 'bystander')} changed: not what BASE holds"
    return (found(FAULT, message, (one.tensor for one in changed), changed=len(changed), over_budget=largest),)


FAULT = PatternFault(
    code="LC401",
    name="bystander-changed",
    severity="error",
    summary="bystanders changed",
    help="copy these tensors from BASE into MERGED, or find out who trained them",
    detect=detect,
    verdict=Verdict.REFUTED,
    causes=("M44",),
)
