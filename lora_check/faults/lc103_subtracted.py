"""LC103 subtracted

What it is
The delta was taken off instead of added.

How it happens
BASE and MERGED were swapped on the command line.
An unmerge ran on a model that had not been merged.
The sign of alpha or of a weight was lost or doubled in a script.

How it is told
W' = W - s B A reproduces every element. After a swap MERGED is BASE less the delta but for the rounding of
BASE, so in a narrow dtype some targets may be told as unexplained (LC199), with a survival of about -1.

Evidence
over_budget: elements of the worst target that no honest merge can have written. survival: about -1.

What to do
Check the order of the arguments first: BASE ADAPTER MERGED.

Seen in
No public report known.
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import rescaled
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W - s B A."""
    return rescaled(case, lambda scale: replace(scale, alpha=-scale.alpha))


FAULT = ValueFault(
    code="LC103",
    name="subtracted",
    severity="error",
    summary="delta subtracted",
    help="check that BASE and MERGED are not swapped on the command line, and that no unmerged model was unmerged",
    inject=inject,
)
