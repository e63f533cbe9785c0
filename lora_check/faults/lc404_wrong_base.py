"""LC404 wrong-base

What it is
MERGED was not made from this BASE: most tensors that no adapter touches differ.

How it happens
BASE is another revision, size or stage: the instruct model for the plain one, the model before an earlier
fine-tune.
The exporter fetched the base from the hub by its name, in place of the local copy it was trained on.

How it is told
Bystanders are the witness: more than half of them are not the base bit for bit, and no rounding explains
it. What the targets show is no evidence of its own then, so those that nothing explained (LC199) are told
here.

Evidence
changed, bystanders: how many differ, of how many. targets: how many targets nothing explained.

What to do
Run the check again with the base that the merge really used as BASE.

Seen in
hiyouga/LlamaFactory#6105, ymcui/Chinese-LLaMA-Alpaca#816, unslothai/unsloth#2150, unslothai/unsloth#3497
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding if most bystanders changed."""
    bystanders = [one for one in comparisons if one.kind == "bystander"]
    changed = [one for one in bystanders if one.verdict is Verdict.REFUTED and one.code is None]
    if 2 * len(changed) <= len(bystanders):
        return ()
    targets = [one for one in comparisons if one.kind == "target" and one.code == "LC199"]
    message = f"made from another base: {len(changed)} of {many(len(bystanders), 'bystander')} differ from BASE"
    return (
        found(
            FAULT,
            message,
            (one.tensor for one in (*changed, *targets)),
            changed=len(changed),
            bystanders=len(bystanders),
            targets=len(targets),
        ),
    )


FAULT = PatternFault(
    code="LC404",
    name="wrong-base",
    severity="error",
    summary="made from another base",
    help="run the check again with the base that the merge really used",
    detect=detect,
    absorbs=("LC401", "LC199"),
    verdict=Verdict.REFUTED,
)
