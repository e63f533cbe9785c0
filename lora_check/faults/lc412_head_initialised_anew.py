"""LC412 head-initialised-anew

What it is
A tensor that the adapter carries whole holds random numbers in MERGED, as a new layer has them: neither the adapter's
nor BASE's.

How it happens
The head of a classifier is not in the base's file, so loading the base makes a new one; the export left the
adapter's out, and every export gives another one.
The adapter was made from its configuration and never loaded.

How it is told
The tensor is independent of the adapter's and of BASE's, and its mean and mean square are those of a new layer: normal
with initializer_range, or uniform as torch draws it. Tensors of few numbers are not judged.

Evidence
drawn: how a new layer of these numbers is made.

What to do
Load the adapter with its modules_to_save into the model class that it was trained with, and merge once more.

Seen in
huggingface/peft#1836, huggingface/peft#2289, huggingface/peft#1678, huggingface/peft#1226
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_check.faults._cases import never
from lora_check.faults._whole import stands_in, trained
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

USUAL = 0.02
"""initializer_range of a configuration that does not say it."""


def recognise(case: Case, actual: Tensor) -> Mapping[str, Any] | None:
    """How the tensor was drawn, if nothing else is known of it."""
    from lora_check.fresh import drawn, related

    whole = [step.factors["S"].reshape(actual.shape) for step in trained(case) if "S" in step.factors]
    if not whole or case.grid is not None:
        return None
    phrase = drawn(actual, float(case.config.get("initializer_range") or USUAL))
    others = [*whole, *([] if stands_in(case.base) else [case.base])]
    if not phrase or any(related(actual, one) for one in others):
        return None
    return {"drawn": phrase}


FAULT = ValueFault(
    code="LC412",
    name="head-initialised-anew",
    severity="error",
    summary="random numbers, as a new layer has them, in place of a saved module",
    help="load the adapter with its modules_to_save into the model class that it was trained with, and merge once more",
    inject=never,
    recognise=recognise,
    kinds=("copy",),
    causes=("M27",),
)
