"""LC502 layers-left-out

What it is
The adapter was merged in some layers, and every target of the others holds the base.

How it happens
The merge works layer by layer or file by file, and skipped some: an exporter that streams the base from disk
(Unsloth, LLaMA-Factory, Axolotl), a pipeline stage that did not send its adapter.
layers_to_transform was given to the merge and not to the training.

How it is told
Every target of a layer (the first number in its name) is told as not applied (LC101), and some other layer
is not so. Families, files and parts that were left out everywhere are told apart (LC501, LC504, LC505), and so
are the last layers of a stack (LC506).

Evidence
layers: for each stack, which layers hold the base. targets: how many targets there are in all.

What to do
Merge again into an empty folder with the whole base in memory.

Seen in
unslothai/unsloth-zoo#808, hiyouga/LlamaFactory#3096, axolotl-ai-cloud/axolotl#3294,
turbo-llm/turbo-alignment#66
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.extent import layers_of
from lora_check.faults._findings import found
from lora_check.faults._left_out import left_at_base, left_out, targets
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every layer that was left out whole, if some other was not."""
    left = left_out(plan, comparisons).get("LC502", [])
    if not left:
        return ()
    names = [one.tensor for one in left]
    message = left_at_base(left, comparisons)
    return (found(FAULT, message, names, layers=layers_of(names), targets=targets(comparisons)),)


FAULT = PatternFault(
    code="LC502",
    name="layers-left-out",
    severity="error",
    summary="layers left out",
    help="merge again into an empty folder, with the whole base in memory",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
    causes=("M25",),
)
