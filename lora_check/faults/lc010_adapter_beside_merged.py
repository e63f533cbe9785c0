"""LC010 adapter-beside-merged

What it is
The folder of MERGED holds an adapter with its configuration as well. transformers, where PEFT is installed, puts that
adapter on whatever it loads from the folder: the merged weights get the delta a second time.

How it happens
The merged model was saved into the folder of the adapter, or the adapter into that of the merged model.
AutoModelForCausalLM.from_pretrained looks for adapter_config.json first; older releases load the base that it names,
put the adapter on that, and never see the merged weights.

How it is told
By the names in the folder. The weights themselves are checked as always.

Evidence
adapter: the adapter's file.

What to do
Move adapter_config.json and the adapter's file out of the folder of the merged model.

Seen in
No public report known.
"""

from __future__ import annotations

from lora_check.faults._findings import found
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for an adapter in MERGED's folder."""
    adapter = plan.merged_folder.adapter
    if not adapter:
        return ()
    message = f"{adapter} lies in MERGED's folder: transformers adds it to the merged weights as it loads them"
    return (found(FAULT, message, adapter=adapter),)


FAULT = PlanFault(
    code="LC010",
    name="adapter-beside-merged",
    severity="error",
    summary="an adapter in the folder of the merged model",
    help="move adapter_config.json and the adapter's file out of the folder of the merged model",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M15",),
)
