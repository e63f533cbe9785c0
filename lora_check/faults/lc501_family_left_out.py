"""LC501 family-left-out

What it is
The adapter was merged, but for every target of some family of modules: all k_proj, or all experts, hold the
base.

How it happens
The export script has its own list of modules, such as q_proj and v_proj, and does not read the adapter's.
The exporter does not recognise how a family is stored, fused or one by one, and keeps the base without an
error.

How it is told
Every target of the family is told as not applied (LC101), and some target of another family is not. Targets
that cannot show the delta have no say.

Evidence
families: for each of them, how many targets hold the base. targets: how many targets there are in all.

What to do
Merge again with the adapter's own target_modules, by PEFT or by a tool that knows this architecture.

Seen in
tloen/alpaca-lora#272, linhduongtuan/BLOOM-LORA#8, unslothai/unsloth-zoo#779, unslothai/unsloth#5410
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_check.faults._findings import found, listed, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every family that was left out whole, if some other was not."""
    targets = [one for one in comparisons if one.kind == "target"]
    telling = [one for one in targets if one.verdict is not Verdict.INCONCLUSIVE and one.signal and not one.vanished]
    merged = {one.family for one in telling if one.code != "LC101"}
    left = [one for one in telling if one.family not in merged]
    if not merged or not left:
        return ()
    families = Counter(one.family for one in left)
    message = f"{listed(families)} left out: {len(left)} of {many(len(targets), 'target')} hold the base"
    return (found(FAULT, message, (one.tensor for one in left), families=dict(families), targets=len(targets)),)


FAULT = PatternFault(
    code="LC501",
    name="family-left-out",
    severity="error",
    summary="a family of modules left out",
    help="merge again with the adapter's own target_modules",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
)
