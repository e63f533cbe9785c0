"""LC308 older-release-formula

What it is
Targets that an honest merge by another release of PEFT wrote: with that release's formula, which differs from today's.

How it happens
The adapter was trained and merged by a release that applied it otherwise: LoKr without alpha / r up to 0.13, OFT's last
Neumann coefficient in 0.16 and 0.17, stacked experts turned over in 0.17 and 0.18.
The adapter was trained by one release and merged by another with the other formula. The files do not tell which one
trained it, unless the configuration records peft_version (PEFT 0.18 and later do); then only that formula is right.

How it is told
Today's formula cannot have written them; the other release's reproduces them. It is what base and adapter compute
together in that release, so the merge is right if it also trained the adapter.

Evidence
release: the releases with that formula. targets: how many.

What to do
Load the adapter with the release that trained it before you trust either merge.

Seen in
huggingface/peft#2180, huggingface/peft#3165
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for each release whose formula was used."""
    releases = dict.fromkeys(one.release for one in comparisons if one.release)
    return tuple(_finding(name, [one for one in comparisons if one.release == name]) for name in releases)


def _finding(release: str, targets: Sequence[Comparison]) -> Finding:
    message = f"the formula of {release} in {many(len(targets), 'target')}"
    return found(FAULT, message, (one.tensor for one in targets), release=release, targets=len(targets))


FAULT = PatternFault(
    code="LC308",
    name="older-release-formula",
    severity="warning",
    summary="merged with the formula of another PEFT release",
    help="load the adapter with the release that trained it before you trust either merge",
    detect=detect,
)
