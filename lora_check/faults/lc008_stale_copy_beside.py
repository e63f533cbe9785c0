"""LC008 stale-copy-beside

What it is
Beside the weights that were checked lie others that have tensors of the same names with other numbers: an older merge,
or the base. The verdict is of the files that transformers and vLLM load; a tool that reads every file may load the
others.

How it happens
The output folder of an earlier export was used again: the new save has fewer shards, and those of the old set that it
did not overwrite stay. safetensors were saved beside an older pytorch_model.bin.
mlx-lm, and the converter of llama.cpp, read every model*.safetensors; old releases read pytorch_model.bin.

How it is told
The tensors of both are compared byte for byte.

Evidence
checked: the files that were read. stale: the others. differing: how many tensors they hold with other numbers.

What to do
Move the stale files out of the folder, or save the merge again into an empty one.

Seen in
unslothai/unsloth-zoo#808, unslothai/unsloth-zoo#950, unslothai/unsloth#8500, Blaizzy/mlx-vlm#1464
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_check.faults._findings import found, listed, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for each set of other weights that no loader prefers and that holds other numbers."""
    return tuple(_stale(plan))


def _stale(plan: Plan) -> Iterator[Finding]:
    for spare in plan.merged_folder.spares:
        names = () if spare.rival else spare.differing() or ()
        if names:
            message = f"{listed(spare.files, limit=3)} beside what was checked, with other numbers in "
            evidence = {"checked": list(plan.merged_folder.read), "stale": list(spare.files), "differing": len(names)}
            yield found(FAULT, message + many(len(names), "tensor"), names, **evidence)


FAULT = PatternFault(
    code="LC008",
    name="stale-copy-beside",
    severity="warning",
    summary="other weights with other numbers beside those that were checked",
    help="move the stale files out of the folder, or save the merge again into an empty one",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M15",),
)
