"""LC202 extra-tensor

What it is
MERGED holds tensors that neither base nor adapter explains.

How it happens
The output folder was used before, and shards of the earlier model are still in it.
A head was made at random when the model was loaded as another class, and was saved with it.

How it is told
By names alone, known renames and heads tied to an embedding taken into account. Names of an unmerged PEFT
model belong to LC207, names that may be those of missing tensors to LC209, those of another class to LC211.

Evidence
extra: how many there are.

What to do
Save the merged model again into an empty folder.

Seen in
huggingface/trl#398, OptimalScale/LMFlow#561
"""

from __future__ import annotations

from lora_check.faults._classes import gained
from lora_check.faults._containers import left_over
from lora_check.faults._findings import found, listed, many
from lora_check.faults._unpaired import unpaired
from lora_check.faults._wrapped import wrapped
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every extra name that neither LC207 nor LC209 nor LC211 nor LC314 explains."""
    told = {*wrapped(plan), *unpaired(plan).values(), *gained(plan), *left_over(plan)}
    extra = [name for name in plan.extra if name not in told]
    if not extra:
        return ()
    message = f"{many(len(extra), 'tensor')} of MERGED that nothing explains: {listed(extra, limit=2)}"
    return (found(FAULT, message, extra, extra=len(extra)),)


FAULT = PlanFault(
    code="LC202",
    name="extra-tensor",
    severity="error",
    summary="tensors of MERGED that nothing explains",
    help="save the merged model again into an empty folder",
    detect=detect,
    verdict=Verdict.REFUTED,
    causes=("M16", "M15"),
)
