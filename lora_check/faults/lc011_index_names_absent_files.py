"""LC011 index-names-absent-files

What it is
An index in the folder of MERGED names weight files that are not there. It is not the index of what was checked; were
it, the check could not have begun.

How it happens
A merge was saved as one file over a sharded one: save_pretrained deletes the old shards and leaves their index.
vLLM keeps only the files that the index names, and finds none.
The index was copied from the base by hand, and the merge has another number of shards.

How it is told
By the names in the folder and the weight_map of each index.

Evidence
indexes: each with the files that it names in vain.

What to do
Delete the index, or copy the files that it names into the folder.

Seen in
unslothai/unsloth-zoo#950, unslothai/unsloth#2355
"""

from __future__ import annotations

from lora_check.faults._findings import found, listed
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each such index."""
    return tuple(
        found(FAULT, f"{index} names files that are not there: {listed(files, limit=3)}", indexes={index: list(files)})
        for index, files in plan.merged_folder.absent.items()
    )


FAULT = PlanFault(
    code="LC011",
    name="index-names-absent-files",
    severity="warning",
    summary="an index of files that are not there",
    help="delete the index, or copy the files that it names into the folder",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M15",),
)
