"""LC501 family-left-out

What it is
The adapter was merged, but for every target of some family of modules: all k_proj, say, hold the base.

How it happens
The export script has its own list of modules, such as q_proj and v_proj, and does not read the adapter's:
alpaca-lora's export_hf_checkpoint.py and its copies.
The tool does not recognise how a family is stored, fused or one by one, and keeps the base without an error:
LoRA supermerger, exporters of newer architectures.

How it is told
Every target of the family is told as not applied (LC101), and some target of another family is not. Targets
that cannot show the delta have no say. Experts are told apart (LC503), and so are files, parts of a model and
adapters that were left out whole.

Evidence
families: for each of them, how many targets hold the base. targets: how many targets there are in all.

What to do
Merge again with the adapter's own target_modules, by PEFT or by a tool that knows this architecture.

Seen in
tloen/alpaca-lora#272, linhduongtuan/BLOOM-LORA#8, hako-mikan/sd-webui-supermerger#412
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_check.faults._findings import found
from lora_check.faults._left_out import left_at_base, left_out, targets
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every family that was left out whole, if some other was not."""
    left = left_out(plan, comparisons).get("LC501", [])
    if not left:
        return ()
    families = dict(Counter(one.family for one in left))
    message = left_at_base(left, comparisons)
    evidence = {"families": families, "targets": targets(comparisons)}
    return (found(FAULT, message, (one.tensor for one in left), **evidence),)


FAULT = PatternFault(
    code="LC501",
    name="family-left-out",
    severity="error",
    summary="a family of modules left out",
    help="merge again with the adapter's own target_modules",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
    causes=("M25",),
)
