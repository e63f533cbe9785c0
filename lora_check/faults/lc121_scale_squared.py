"""LC121 scale-squared

What it is
The scale was applied two times: the delta was multiplied by s s.

How it happens
A converter multiplied the scale into a factor and left alpha and r in the configuration (kohya, mlx), or an
adapter's lora_A and lora_B were each multiplied by s.
PEFT's add_weighted_adapter put the scale into the new factors, and the merge scaled them again.

How it is told
W' = W + s^2 B A reproduces every element. At s = 2, alpha being twice r, this is the number of a merge done
twice, stored once: both are told, and an adapter with another scale tells them apart.

Evidence
scale, right: the scale that was used, and the right one. survival: about s.

What to do
Look for a second place where the scale is multiplied in: the factors of the adapter that was merged, or the
script.

Seen in
huggingface/peft#1155, huggingface/peft#3449
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import rescaled
from lora_check.faults._said import Told, instead
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """s^2, with s = w alpha / r, the weight w of --weights squared as well as the rest or not."""
    whole = rescaled(case, lambda scale: replace(scale, weight=scale.weight * scale.value))
    if all(not step.scale or step.scale.weight == 1 for step in case.steps):
        return whole
    bare = rescaled(case, lambda scale: replace(scale, weight=scale.value))
    return (*bare, *whole)


def tell(told: Told) -> str:
    """'scale applied two times: 4 in place of 2'."""
    return ": ".join(part for part in (FAULT.summary, instead(told)) if part)


FAULT = ValueFault(
    code="LC121",
    name="scale-squared",
    severity="error",
    summary="scale applied two times",
    help="look for a second place where the scale is multiplied in, and leave one of them out",
    inject=inject,
    tell=tell,
    causes=("M10", "M30", "M46"),
)
