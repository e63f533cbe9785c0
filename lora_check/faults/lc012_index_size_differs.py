"""LC012 index-size-differs

What it is
The index of MERGED says that its tensors take another number of bytes than they do. Loaders read on; those that plan
memory by it plan wrongly, and it is a sign that index and shards come from two saves.

How it happens
The index of BASE was copied beside the shards of a merge in another dtype, or with other tensors.
Some exporters count parameters in place of bytes.

How it is told
metadata.total_size of the index against the sum over the headers of its shards.

Evidence
said, found: bytes.

What to do
Write the index anew, if it was not meant.

Seen in
No public report known.
"""

from __future__ import annotations

from lora_check.faults._findings import found
from lora_check.faults._sizes import spoken, total
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding where the two differ; of quantised tensors the sum is not known here."""
    said, metas = plan.merged_folder.total_size, plan.merged_metas.values()
    size = total(metas)
    if said is None or said == size or any(meta.codes for meta in metas):
        return ()
    return (
        found(FAULT, f"MERGED's index says {spoken(said)}, its tensors take {spoken(size)}", said=said, found=size),
    )


FAULT = PlanFault(
    code="LC012",
    name="index-size-differs",
    severity="info",
    summary="an index that says another size than its tensors have",
    help="write the index anew if the difference was not meant",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M15",),
)
