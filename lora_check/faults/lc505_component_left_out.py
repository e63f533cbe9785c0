"""LC505 component-left-out

What it is
The adapter was merged in one part of the model, and a whole other part holds the base: the vision tower, the
text encoder, the decoder.

How it happens
The tool fuses one part and not the other: fuse_lora of diffusers for the U-Net without the text encoder, exporters
of the language model of a vision-language one.
The parts have adapters of their own, or lie in files of their own, and one was not loaded.

How it is told
Every target under one path is told as not applied (LC101); stacks of layers lie under it; and some target of
another stack is not so.

Evidence
components: their paths, and how many targets each has. targets: how many targets there are in all.

What to do
Merge that part too; in diffusers name every component in fuse_lora.

Seen in
huggingface/diffusers#4473, hako-mikan/sd-webui-supermerger#412
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_check.faults._findings import found, listed
from lora_check.faults._left_out import components, left_at_base, left_out, targets, telling
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every part that was left out whole, if another was not."""
    left = left_out(plan, comparisons).get("LC505", [])
    if not left:
        return ()
    names = {one.tensor for one in left}
    parts = components(left, [one for one in telling(comparisons) if one.tensor not in names])
    counts = Counter(part for one in left for part in parts if one.tensor.startswith(f"{part}."))
    message = f"{listed(parts)} not merged: {left_at_base(left, comparisons)}"
    return (found(FAULT, message, (one.tensor for one in left), components=dict(counts), targets=targets(comparisons)),)


FAULT = PatternFault(
    code="LC505",
    name="component-left-out",
    severity="error",
    summary="a part of the model left out",
    help="merge that part of the model too",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
    causes=("M25",),
)
