"""LC507 adapter-nowhere-merged

What it is
Several adapters were given, and nothing shows that one of them was merged: what only it touches holds the base,
and what it shares with others has only theirs.

How it happens
merge_and_unload() merges the active adapters only; adapter_names was not given (PEFT, TRL, supermerger).
A stage of training was left out: its adapter was given here, and not to the merge.

How it is told
Every target that such an adapter alone changes is told as not applied (LC101), every one that it shares as
lacking it (LC127), and other adapters have targets where they are.

Evidence
adapters: which, counted from 1, and where they lie. targets: how many targets there are in all.

What to do
Merge every adapter, by adapter_names or one after the other; give the report only those that are meant.

Seen in
huggingface/peft#3756, hako-mikan/sd-webui-supermerger#412
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, listed
from lora_check.faults._left_out import left_at_base, left_out, missing, targets
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every adapter that has targets of its own and is in none."""
    left = left_out(plan, comparisons).get("LC507", [])
    if not left:
        return ()
    idle = sorted({index + 1 for one in left for index in one.adapters})
    shared = [one for one in comparisons if missing(one) and missing(one).issubset(idle)]
    told = {str(number): plan.adapters[number - 1].location for number in idle if number <= len(plan.adapters)}
    subject = f"adapter{'s' if len(idle) > 1 else ''} {listed(map(str, idle))}"
    more = f", and {len(shared)} shared ones lack it" if shared else ""
    message = f"{subject} not merged anywhere: {left_at_base(left, comparisons)}{more}"
    names = (one.tensor for one in (*left, *shared))
    return (found(FAULT, message, names, adapters=told, targets=targets(comparisons)),)


FAULT = PatternFault(
    code="LC507",
    name="adapter-nowhere-merged",
    severity="error",
    summary="an adapter that was merged nowhere",
    help="merge every adapter, by adapter_names or one after the other",
    detect=detect,
    absorbs=("LC101", "LC127"),
    verdict=Verdict.REFUTED,
    causes=("M25",),
)
