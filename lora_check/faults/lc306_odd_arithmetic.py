"""LC306 odd-arithmetic

What it is
A few targets can only have been written by another order of operations than the one that wrote the other targets bit
for bit, and even that order does not reproduce their bits.

How it happens
A last bit changed after the merge: a conversion, a copy, an edit, a failing disk.
A scale is off by so little that only the rounding of tensor cores could excuse it.
Part of the model was merged on another device.

How it is told
The other targets of that dtype are reproduced bit for bit under one order. These are not, and that order cannot have
written them; an order with more freedom could.

Evidence
arithmetic: the order that could have written them. others: the order that wrote the other targets.

What to do
Merge again in one run on one machine, and compare the two files.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, listed, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for each dtype with such targets."""
    return tuple(
        _finding(odd, usual)
        for dtype in dict.fromkeys(one.dtype for one in comparisons)
        for odd, usual in [_odd([one for one in comparisons if one.dtype == dtype and one.kind == "target"])]
        if odd
    )


def _odd(targets: Sequence[Comparison]) -> tuple[list[Comparison], list[str]]:
    """The targets that no order of the exact ones explains, and those orders."""
    usual = list(dict.fromkeys(one.arithmetic for one in targets if one.exact and one.arithmetic))
    odd = [one for one in targets if one.arithmetic and not one.exact and one.arithmetic not in usual]
    return (odd if usual else []), usual


def _finding(odd: Sequence[Comparison], usual: Sequence[str]) -> Finding:
    orders = dict.fromkeys(one.arithmetic for one in odd if one.arithmetic)
    message = f"{many(len(odd), 'target')} written in another arithmetic than the rest, and not bit for bit"
    return found(
        FAULT, message, (one.tensor for one in odd), arithmetic=listed(orders), others=listed(usual), odd=len(odd)
    )


FAULT = PatternFault(
    code="LC306",
    name="odd-arithmetic",
    severity="warning",
    summary="targets written in another arithmetic than the rest",
    help="merge again in one run on one machine, and compare the two files",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
)
