"""LC113 base-and-merged-swapped

What it is
The checkpoint given as MERGED is the base, and the one given as BASE is the merge.

How it happens
The arguments were given in the wrong order, or two folders were renamed.

How it is told
The formula is replayed the other way round: adding the delta to the tensor given as MERGED and storing it reproduces
the tensor given as BASE, element by element. LC103 subtracts the delta from BASE instead; in a narrow dtype the two
differ by their rounding.

Evidence
over_budget: elements of the worst target that no honest merge into this order can have written. survival: about -1.

What to do
Give the arguments in this order: BASE ADAPTER [ADAPTER ...] MERGED.

Seen in
No public report known.
"""

from __future__ import annotations

from lora_check.faults._cases import deltas
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """The honest case itself: what changes is which checkpoint is asked."""
    return (case,) if deltas(case) else ()


FAULT = ValueFault(
    code="LC113",
    name="base-and-merged-swapped",
    severity="error",
    summary="BASE and MERGED swapped",
    help="give the arguments in this order: BASE ADAPTER [ADAPTER ...] MERGED",
    inject=inject,
    exchanged=True,
)
