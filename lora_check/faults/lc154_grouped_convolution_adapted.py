"""LC154 grouped-convolution-adapted

What it is
The adapter changes a convolution with groups (a depthwise one has as many as channels), and no merged weight can do
what it does.

How it happens
PEFT lets such a layer be trained: its lora_A sees all input channels, its lora_B a group of the ranks. The weight has
room for the channels of one group alone, so PEFT refuses to merge it. Scripts that do not know either leave the layer
out or add what broadcasting makes of the product. Seen with the convolutions of Mamba layers, as in Falcon-H1.

How it is told
By shapes: lora_A (r, g in, k...) over a weight (out, in, k...) with g above 1. Whatever MERGED holds there is not base
plus adapter; what it holds is not looked at.

Evidence
groups: each g that occurs.

What to do
Leave the convolution out of target_modules and train again, or serve the adapter unmerged.

Seen in
tiiuae/Falcon-H1#13, axolotl-ai-cloud/axolotl#3599, huggingface/peft#3440
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_check.faults._findings import found, many
from lora_check.types import Adapter, Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every target that is a convolution with groups."""
    groups = dict(pair for adapter in plan.adapters for pair in _grouped(plan, adapter))
    if not groups:
        return ()
    message = f"{many(len(groups), 'convolution')} with groups in the adapter: no merged weight can do what it does"
    return (found(FAULT, message, groups, groups=sorted(set(groups.values()))),)


def _grouped(plan: Plan, adapter: Adapter) -> Iterator[tuple[str, int]]:
    """Merged tensor -> its number of groups."""
    metas = adapter.checkpoint.metas()
    shapes = {part.module: metas[part.tensor].shape for part in adapter.parts if part.role == "A"}
    for pairing in plan.pairings:
        a, w = shapes.get(pairing.merged.name.removesuffix(".weight"), ()), pairing.merged.shape
        if len(a) == len(w) > 2 and a[2:] == w[2:] and a[1] > w[1] and a[1] % w[1] == 0:
            yield pairing.merged.name, a[1] // w[1]


FAULT = PlanFault(
    code="LC154",
    name="grouped-convolution-adapted",
    severity="error",
    summary="an adapter of a convolution with groups",
    help="leave the convolution out of target_modules and train again, or serve the adapter unmerged",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M49",),
)
