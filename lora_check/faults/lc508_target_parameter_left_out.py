"""LC508 target-parameter-left-out

What it is
The adapter changes several raw parameters of one module, such as gate_up_proj and down_proj of a mixture's
experts, and one of them holds the base.

How it happens
PEFT wraps such a module once for each parameter, one wrapper in the other; a tool unwraps the outermost, or maps
only keys without base_layer, and the rest is dropped: older PEFT, ms-swift.
target_parameters was given as one text and taken apart into letters.

How it is told
Every target of one name in target_parameters is told as not applied (LC101), and another name of the same
modules is not.

Evidence
left_out: the parameters that hold the base. merged: those that do not. targets: how many there are in all.

What to do
Merge with today's PEFT, or with a tool that unwraps every parameter of a module.

Seen in
huggingface/peft#2638, huggingface/peft#2665, huggingface/peft#2710, huggingface/peft#3340, huggingface/peft#3350,
huggingface/peft#3229, huggingface/peft#3236, modelscope/ms-swift#9321
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found
from lora_check.faults._left_out import left_at_base, left_out, targets
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every parameter that was left out beside one that was not."""
    left = left_out(plan, comparisons).get("LC508", [])
    if not left:
        return ()
    homes = {one.module.rpartition(".")[0] for one in left}
    lost = {one.family for one in left}
    others = {one.family for one in comparisons if one.kind == "target" and one.module.rpartition(".")[0] in homes}
    evidence = {"left_out": sorted(lost), "merged": sorted(others - lost), "targets": targets(comparisons)}
    message = f"one of several target_parameters left out: {left_at_base(left, comparisons)}"
    return (found(FAULT, message, (one.tensor for one in left), **evidence),)


FAULT = PatternFault(
    code="LC508",
    name="target-parameter-left-out",
    severity="error",
    summary="one of several target_parameters left out",
    help="merge with a tool that unwraps every parameter of a module, such as today's PEFT",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
    causes=("M50",),
)
