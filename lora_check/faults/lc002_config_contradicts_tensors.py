"""LC002 config-contradicts-tensors

What it is
adapter_config.json and the adapter's tensors cannot both be right, so what a merge must give is not
settled.

How it happens
The configuration comes from another run than the tensors, or was edited by hand: another r, another target.
The adapter was made for a model of another size, so that its factors do not fit the weights of BASE.

How it is told
By headers alone: r against the rows of lora_A, the shapes of the factors against the shape of the weight
they name. An adapter in which no tensor has an element is told by LC003.

Evidence
contradictions: one phrase for each place where the two disagree.

What to do
Take adapter_config.json and adapter_model.safetensors from the same save of the same run.

Seen in
tloen/alpaca-lora#272, huggingface/peft#1746
"""

from __future__ import annotations

from lora_check.faults._empty import WITHOUT_ELEMENTS, is_empty
from lora_check.faults._findings import found, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every contradiction."""
    empty = any(is_empty(adapter) for adapter in plan.adapters)
    told = [one for one in plan.contradictions if not (empty and one.endswith(WITHOUT_ELEMENTS))]
    if not told:
        return ()
    first, *rest = told
    message = f"{first}, and {many(len(rest), 'more contradiction')}" if rest else first
    return (found(FAULT, message, contradictions=told),)


FAULT = PlanFault(
    code="LC002",
    name="config-contradicts-tensors",
    severity="error",
    summary="the adapter's configuration contradicts its tensors",
    help="take adapter_config.json and the adapter's tensors from the same save",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M38", "M47"),
)
