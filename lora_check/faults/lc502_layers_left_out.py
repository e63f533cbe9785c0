"""LC502 layers-left-out

What it is
The adapter was merged in some layers, and every target of the others holds the base.

How it happens
The merge stopped half-way, or worked shard by shard and lost one; the shard of the base was kept in its
place.
One pipeline stage did not send its adapter, or layers on disk were skipped when the rest was merged.

How it is told
Every target of a layer (the first number in its name) is told as not applied (LC101), and some other layer
is not so. Families that were left out everywhere belong to LC501 and have no say here.

Evidence
layers: for each stack, which layers hold the base. targets: how many targets there are in all.

What to do
Merge again into an empty folder with the whole base in memory.

Seen in
unslothai/unsloth-zoo#808, hiyouga/LlamaFactory#3096, axolotl-ai-cloud/axolotl#3294,
turbo-llm/turbo-alignment#66
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict

_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<number>\d+)(?:\.|$)")

Layer = tuple[str, int]


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every layer that was left out whole, if some other was not."""
    targets = [one for one in comparisons if one.kind == "target"]
    telling = [one for one in targets if one.verdict is not Verdict.INCONCLUSIVE and one.signal and not one.vanished]
    families = {one.family for one in telling if one.code != "LC101"}
    placed = [(layer, one) for one in telling if one.family in families and (layer := _layer(one.module))]
    merged = {layer for layer, one in placed if one.code != "LC101"}
    left = [(layer, one) for layer, one in placed if layer not in merged]
    if not merged or not left:
        return ()
    stacks = _stacks(layer for layer, _ in left)
    plural = "layer" if len({layer for layer, _ in left}) == 1 else "layers"
    several = len({stack for (stack, _), _ in placed}) > 1
    where = " and ".join(f"{ranges} of {stack}" if several else ranges for stack, ranges in stacks.items())
    message = f"{plural} {where} left out: {len(left)} of {many(len(targets), 'target')} hold the base"
    return (found(FAULT, message, (one.tensor for _, one in left), layers=stacks, targets=len(targets)),)


def _layer(module: str) -> Layer | None:
    """('model.layers', 12) of model.layers.12.self_attn.q_proj."""
    found = _LAYER.match(module)
    return (found["stack"].rstrip("."), int(found["number"])) if found else None


def _stacks(layers: Iterable[Layer]) -> dict[str, str]:
    """Stack -> its layers as ranges: '0-3, 7, 12-23'."""
    numbers: dict[str, list[int]] = {}
    for stack, number in sorted(set(layers)):
        numbers.setdefault(stack, []).append(number)
    return {stack: ", ".join(_ranges(every)) for stack, every in numbers.items()}


def _ranges(numbers: Sequence[int]) -> Iterable[str]:
    start = last = numbers[0]
    for number in (*numbers[1:], None):
        if number == last + 1:
            last = number
            continue
        yield f"{start}-{last}" if last > start else f"{start}"
        if number is not None:
            start = last = number


FAULT = PatternFault(
    code="LC502",
    name="layers-left-out",
    severity="error",
    summary="layers left out",
    help="merge again into an empty folder, with the whole base in memory",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
)
