"""LC305 tensors-not-checked

What it is
Some tensors of MERGED were not read, because the command said so or because BASE has nothing to hold against them; the
verdict speaks of the others only.

How it happens
--include or --exclude was given, or --shard: the other tensors are read elsewhere.
A converter wrote constants into MERGED that it computes from the configuration, rotary frequencies for one.

How it is told
By comparing the names of MERGED with the patterns and the names of buffers. Nothing unread is ever called verified.

Evidence
skipped, elsewhere, computed: how many tensors were not read.

What to do
Run the check again without --include and --exclude before the merge is trusted, or with a BASE of the same format;
join the journals of all shards by merge-reports.

Seen in
No public report known.
"""

from __future__ import annotations

from lora_check.faults._findings import found, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding each for the tensors that were left out, that other shards read, and that were computed."""
    left = f"{many(len(plan.skipped), 'tensor')} not checked, by --include or --exclude"
    made = f"{many(len(plan.computed), 'tensor')} not checked: computed from the configuration, and BASE has none such"
    away = f"{many(len(plan.elsewhere), 'tensor')} not checked here: they are for the other shards"
    told = ((left, plan.skipped, "skipped"), (away, plan.elsewhere, "elsewhere"), (made, plan.computed, "computed"))
    return tuple(found(FAULT, message, names, **{key: len(names)}) for message, names, key in told if names)


FAULT = PlanFault(
    code="LC305",
    name="tensors-not-checked",
    severity="info",
    summary="tensors left out, or that BASE has nothing to hold against",
    help="run the check again without --include and --exclude, or join all shards by merge-reports",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
)
