"""LC315 side-files-differ

What it is
The weights have a verdict of their own; what they are used with is not what BASE is used with: a tokenizer, a chat
template or a generation configuration is absent, or says something else.

How it happens
Only the weights were saved, or the exporter copies a list of files that lacks one. The template of training took the
place of the base's. Without the base's eos tokens a model never stops; with sampling on, two runs differ anyway.

How it is told
By the names in both folders, the text of the chat template, and the keys of generation_config.json. Told only where
BASE's folder has the file.

Evidence
absent: the kinds of file that MERGED lacks. changed: what both have and differs.

What to do
If the weights are verified and the answers differ all the same, the merge is not the reason. Copy these files from
BASE, or from the adapter's folder where training changed them; compare with sampling off, the same template and the
same dtype, and do not load one of the two in 4 bit.

Seen in
QwenLM/Qwen-VL#302, unslothai/unsloth#928, QwenLM/Qwen#1168, modelscope/ms-swift#1471, hiyouga/LlamaFactory#2771
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_check.faults._classes import changed
from lora_check.faults._findings import found, listed
from lora_check.types import Finding, Folder, Plan, PlanFault, Verdict

GENERATION = "a generation configuration"
"""Of no use to a class that generates nothing."""

OF_THE_SAVE = ("transformers_version", "_from_model_config")
"""Keys of generation_config.json that say how it was written."""


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with all that is absent and all that is changed; nothing of MERGED in memory or as one file."""
    ours, theirs = plan.base_folder, plan.merged_folder
    if not ours.read or not theirs.read:
        return ()
    absent = [kind for kind in ours.sides if kind not in theirs.sides and not (kind == GENERATION and changed(plan))]
    other = list(_changed(ours, theirs))
    told = [
        *([f"MERGED lacks {listed(absent)}"] if absent else []),
        *([f"changes {listed(other)}"] if other else []),
    ]
    return (found(FAULT, " and ".join(told), absent=absent, changed=other),) if told else ()


def _changed(ours: Folder, theirs: Folder) -> Iterator[str]:
    if ours.template and theirs.template and ours.template != theirs.template:
        yield "the chat template"
    if ours.generation and theirs.generation:
        yield from (f"{key} of the generation" for key in _keys(ours.generation, theirs.generation))


def _keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    every = dict.fromkeys([*one, *other])
    return [key for key in every if key not in OF_THE_SAVE and one.get(key) != other.get(key)]


FAULT = PlanFault(
    code="LC315",
    name="side-files-differ",
    severity="info",
    summary="files that the model is used with, absent or changed",
    help="copy them from BASE, and compare outputs with sampling off, one template and one dtype",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M35", "M58"),
)
