"""LC309 blurred-formula

What it is
Targets whose right value is known no better than their delta is large: the merge keeps within its budget, and so would
many a wrong one.

How it happens
The formula takes a matrix apart whose singular values lie so close together that two machines find different parts.
Elements are chosen by size or by sign, and rounding leaves open which.

How it is told
The sum of the squared half-widths of the budget is at least that of the squared delta, and the bits are not those of
the replayed arithmetic, which alone would prove the merge.

Evidence
targets: how many there are.

What to do
Check on the machine, and with the libraries, that merged: there the bits may be reproduced.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every such target."""
    blurred = [one for one in comparisons if one.blurred and one.verdict is Verdict.INCONCLUSIVE]
    if not blurred:
        return ()
    message = f"the formula leaves {many(len(blurred), 'target')} known no better than the delta is large"
    return (found(FAULT, message, (one.tensor for one in blurred), targets=len(blurred)),)


FAULT = PatternFault(
    code="LC309",
    name="blurred-formula",
    severity="info",
    summary="targets whose budget is as large as their delta",
    help="check on the machine, and with the libraries, that merged",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
)
