"""LC004 zero-adapter

What it is
The adapter's delta is exactly zero in every target: the merge adds nothing, done or not.

How it happens
The adapter was saved before its first training step, when B is still zero.
The trained factors were not loaded before the save, or became zero when they were stored in fp16.

How it is told
The sum of squares of s B A is 0 in every target. MERGED equals BASE whatever was done to it, so neither
'merged' nor 'not merged' can be proved.

Evidence
targets: how many targets there are.

What to do
Look at B in the adapter file, and train or save the adapter again.

Seen in
tloen/alpaca-lora#446, hiyouga/LlamaFactory#7665, kohya-ss/sd-webui-additional-networks#49,
huggingface/peft#1017
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding if no measured target has a delta; a target that nobody could recompute was not measured."""
    doubtful = {pairing.merged.name for pairing in plan.pairings if pairing.undecidable}
    targets = [one for one in comparisons if one.kind == "target" and one.tensor not in doubtful]
    if not targets or any(one.signal != 0 for one in targets):
        return ()
    message = f"the adapter's delta is zero in every target, {len(targets)} in all"
    return (found(FAULT, message, (one.tensor for one in targets), targets=len(targets)),)


FAULT = PatternFault(
    code="LC004",
    name="zero-adapter",
    severity="error",
    summary="the adapter's delta is zero everywhere",
    help="train the adapter, or save it again after its factors were loaded",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M57",),
)
