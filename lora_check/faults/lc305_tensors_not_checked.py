"""LC305 tensors-not-checked

What it is
Some tensors of MERGED were not read, because the command said so; the verdict speaks of the others only.

How it happens
--include or --exclude was given.

How it is told
By comparing the names of MERGED with the patterns. Nothing unread is ever called verified.

Evidence
skipped: how many tensors were not read.

What to do
Run the check again without --include and --exclude before the merge is trusted.

Seen in
No public report known.
"""

from __future__ import annotations

from lora_check.faults._findings import found, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every tensor that was left out."""
    if not plan.skipped:
        return ()
    message = f"{many(len(plan.skipped), 'tensor')} not checked, by --include or --exclude"
    return (found(FAULT, message, plan.skipped, skipped=len(plan.skipped)),)


FAULT = PlanFault(
    code="LC305",
    name="tensors-not-checked",
    severity="info",
    summary="tensors left out by --include or --exclude",
    help="run the check again without --include and --exclude",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
)
