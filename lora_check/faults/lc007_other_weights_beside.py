"""LC007 other-weights-beside

What it is
The folder of MERGED holds more weights than those that were checked. What was checked is what transformers loads.

How it happens
The folder was used before, and shards, an index or a single file of the earlier model are still in it. A repository
ships two formats, pytorch_model.bin beside safetensors, or Meta's consolidated files beside the shards.
Tools that read every model*.safetensors, as mlx-lm and the converter of llama.cpp do, take all of them.

How it is told
By the names in the folder: model.safetensors is taken first, then the shards that the index names, then the pickles.
Where the other weights have tensors of the same name with other numbers, LC008 or LC009 says so.

Evidence
checked: the files that were read. beside: the others.

What to do
Move what does not belong to this merge out of the folder.

Seen in
unslothai/unsloth-zoo#808, unslothai/unsloth-zoo#950, Blaizzy/mlx-vlm#1827, Neph0s/CoSER#3
"""

from __future__ import annotations

from lora_check.faults._findings import found, listed, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every weight file that was not read."""
    folder = plan.merged_folder
    beside = [file for spare in folder.spares for file in spare.files]
    if not beside:
        return ()
    message = f"{many(len(beside), 'file')} of other weights in MERGED's folder, not checked: {listed(beside, limit=3)}"
    return (found(FAULT, message, checked=list(folder.read), beside=beside),)


FAULT = PlanFault(
    code="LC007",
    name="other-weights-beside",
    severity="info",
    summary="other weights beside those that were checked",
    help="move what does not belong to this merge out of the folder",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M15",),
)
