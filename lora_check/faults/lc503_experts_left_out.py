"""LC503 experts-left-out

What it is
A mixture of experts whose attention was merged, and whose experts, all of them or some, hold the base.

How it happens
The exporter knows one way to store experts (gate_proj, up_proj, down_proj one by one; gate_up_proj stacked; w1,
w2, w3) and the checkpoint has another; it finds no match, or fails, and keeps the base: Unsloth and
unsloth-zoo for nearly every new mixture, ms-swift, Megatron-Bridge.
A shape is guessed (twice the intermediate size is larger than the hidden one), which narrow experts break.
Under expert parallelism one rank's experts were not gathered.

How it is told
Every target of these experts is told as not applied (LC101), and some other target of their layers, or of the
model where it is all experts, is not. A family of all experts that alone was left out is LC501.

Evidence
experts: how many hold the base, in how many layers. stored_as: how MERGED names them. targets: how many there
are in all.

What to do
Merge with PEFT, or with a release of the tool that knows how this checkpoint stores its experts.

Seen in
unslothai/unsloth-zoo#779, unslothai/unsloth-zoo#812, unslothai/unsloth-zoo#885, unslothai/unsloth-zoo#809,
unslothai/unsloth-zoo#647, unslothai/unsloth#5410, unslothai/unsloth#5403, unslothai/unsloth#11014,
NVIDIA-NeMo/Megatron-Bridge#3341, modelscope/ms-swift#6447
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.extent import place
from lora_check.faults._findings import found
from lora_check.faults._left_out import left_at_base, left_out, targets
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with all experts that were left out, if something beside them was not."""
    left = left_out(plan, comparisons).get("LC503", [])
    if not left:
        return ()
    places = [place(one.tensor) for one in left]
    layers = {(one.stack, one.layer) for one in places}
    experts = {(one.stack, one.layer, one.expert) for one in places if one.expert is not None}
    told = f"{len(experts)} in {len(layers)} layers" if experts else f"stacked, in {len(layers)} layers"
    evidence = {"experts": told, "stored_as": sorted({one.path for one in places})[:6], "targets": targets(comparisons)}
    return (found(FAULT, left_at_base(left, comparisons), (one.tensor for one in left), **evidence),)


FAULT = PatternFault(
    code="LC503",
    name="experts-left-out",
    severity="error",
    summary="experts left out",
    help="merge with PEFT, or with a tool that knows how this checkpoint stores its experts",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
    causes=("M05",),
)
