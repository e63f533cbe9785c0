"""LC009 rival-checkpoints

What it is
The folder of MERGED holds model.safetensors and an index with its shards, their numbers differ, and loaders do not
agree on which of the two they take. What this merge is cannot be told.

How it happens
A merge was saved as one file into a folder that held a sharded one, or sharded beside an older model.safetensors;
save_pretrained deletes older shards, but neither an older model.safetensors nor shards of other names.
transformers takes model.safetensors; vLLM the shards that the index names.

How it is told
model.safetensors was checked. The tensors of both are compared byte for byte; shards that cannot be read, or that have
no tensor of the same name, count as others.

Evidence
checked: the file that was read. rival: the others. differing: how many tensors they hold with other numbers.

What to do
Keep one of the two in the folder, and check again.

Seen in
unslothai/unsloth#2978, unslothai/unsloth#2355, unslothai/unsloth-zoo#135, huggingface/diffusers#14719
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_check.faults._findings import found, listed, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for each set of other weights that a widely used loader takes, unless it holds the same."""
    return tuple(_rivals(plan))


def _rivals(plan: Plan) -> Iterator[Finding]:
    for spare in plan.merged_folder.spares:
        names = spare.differing() if spare.rival else ()
        if names == ():
            continue
        what = f"{many(len(names), 'tensor')} differ" if names else "they cannot be compared"
        message = f"transformers loads {listed(plan.merged_folder.read)}, vLLM {listed(spare.files, limit=3)}: {what}"
        evidence = {"checked": list(plan.merged_folder.read), "rival": list(spare.files), "differing": len(names or ())}
        yield found(FAULT, message, names or (), **evidence)


FAULT = PatternFault(
    code="LC009",
    name="rival-checkpoints",
    severity="error",
    summary="two checkpoints in one folder, of which loaders take one or the other",
    help="keep one of the two in the folder, and check again",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M15",),
)
