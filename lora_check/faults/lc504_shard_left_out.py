"""LC504 shard-left-out

What it is
MERGED lies in several files, and every target in one of them, or in some, holds the base.

How it happens
The merge works file by file; one failed, was skipped or was interrupted, and the file of the base took its place.
Files of an older save stayed in the folder, and the new save wrote fewer of them.
One rank of a distributed merge did not write what it had merged: exporters of Unsloth, ms-swift and Axolotl that
stream files.

How it is told
What is told as not applied (LC101) is just what some of the files hold: all their targets, two or more in each
file, and none of another file. It may be whole layers as well; the message says which.

Evidence
files: which of them, and how many targets each holds. targets: how many targets there are in all.

What to do
Merge again into an empty folder, and compare the dates of the files.

Seen in
unslothai/unsloth-zoo#808, axolotl-ai-cloud/axolotl#3294, turbo-llm/turbo-alignment#66
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_check.faults._findings import found, listed
from lora_check.faults._left_out import left_at_base, left_out, targets
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with the files that were left out."""
    left = left_out(plan, comparisons).get("LC504", [])
    if not left:
        return ()
    files = dict(Counter(plan.homes[one.tensor] for one in left))
    message = f"nothing in {listed(files)} was merged: {left_at_base(left, comparisons)}"
    return (found(FAULT, message, (one.tensor for one in left), files=files, targets=targets(comparisons)),)


FAULT = PatternFault(
    code="LC504",
    name="shard-left-out",
    severity="error",
    summary="a file of the checkpoint left out",
    help="merge again into an empty folder, and compare the dates of the files",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
    causes=("M25",),
)
