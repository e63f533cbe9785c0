"""LC221 trained-tensors-beside-adapter

What it is
Beside the adapter lies a second file of trained tensors that are no LoRA factors; nothing of it was read, and whether
it is in MERGED is not known.

How it happens
LLaVA and its descendants keep a projector, or the embeddings, in non_lora_trainables.bin, unsloth and others new
embeddings in a file of their own; a merge that knows adapter_model.safetensors alone leaves them out.

How it is told
By the name of the file, in the folder of the adapter.

Evidence
files: their names.

What to do
Load that file into the merged model too, and save it among the adapter's modules_to_save to have it checked.

Seen in
haotian-liu/LLaVA#1592, haotian-liu/LLaVA#784, haotian-liu/LLaVA#1416, unslothai/unsloth#3926
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_check.faults._findings import found, listed
from lora_check.types import Adapter, Finding, Plan, PlanFault, Verdict

STEMS = ("non_lora_trainables", "non_lora_state_dict", "mm_projector", "new_embeddings", "trainable_params")
ENDINGS = (".bin", ".pt", ".pth", ".safetensors")


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each adapter with such a file."""
    return tuple(
        found(FAULT, f"{listed(files)} beside the adapter: trained tensors that were not read", files=files)
        for files in (sorted(_beside(adapter)) for adapter in plan.adapters)
        if files
    )


def _beside(adapter: Adapter) -> Iterator[str]:
    """The names of such files in the adapter's folder."""
    for folder in {file.parent for file in getattr(adapter.checkpoint, "files", ())}:
        yield from (f"{stem}{end}" for stem in STEMS for end in ENDINGS if (folder / f"{stem}{end}").is_file())


FAULT = PlanFault(
    code="LC221",
    name="trained-tensors-beside-adapter",
    severity="warning",
    summary="trained tensors beside the adapter that were not read",
    help="load that file into the merged model too, and save its tensors among the adapter's modules_to_save",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M03",),
)
