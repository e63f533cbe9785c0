"""LC220 rows-beyond

What it is
A tensor of MERGED has more rows, or fewer, than base and adapter give it: what the rows say that both have, and what
lies beyond them.

How it happens
The vocabulary was resized after the merge, and the new rows were made of zeros, of the mean of the others or at random;
or padded to a multiple of 64.
The base was not resized for the merge, and the rows of the added tokens are gone.
Only one rank's slice of a tensor was saved.

How it is told
The first rows are compared as every tensor is, as many as both have; what is told of the rows beyond is no proof of
them, so the tensor is never verified. LC203 tells the shapes.

Evidence
beyond: tensor -> what there is past the rows that were compared.

What to do
Resize the base as it was when the adapter was trained, merge, and resize nothing afterwards.

Seen in
hiyouga/LlamaFactory#5262, unslothai/unsloth#1225, arcee-ai/mergekit#328, huggingface/peft#2898
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, listed
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for all tensors of which the same is true."""
    rows = {one.merged.name: one.rows for one in plan.pairings if one.wanted}
    told: dict[str, list[Comparison]] = {}
    for one in comparisons:
        if one.beyond:
            right = "not all right" if one.verdict is Verdict.REFUTED else "right"
            told.setdefault(f"the first {rows[one.tensor]} rows are {right}, {one.beyond}", []).append(one)
    return tuple(
        found(
            FAULT,
            f"{listed((one.tensor for one in members), limit=2)}: {phrase}",
            (one.tensor for one in members),
            beyond={one.tensor: one.beyond for one in members},
        )
        for phrase, members in told.items()
    )


FAULT = PatternFault(
    code="LC220",
    name="rows-beyond",
    severity="info",
    summary="more rows than it should have, or fewer",
    help="resize the base as it was when the adapter was trained, merge, and resize nothing afterwards",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M29",),
)
