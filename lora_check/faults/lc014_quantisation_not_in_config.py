"""LC014 quantisation-not-in-config

What it is
Tensors of MERGED are quantised, and its config.json does not say how. A loader takes the codes for numbers, or finds
tensors of other names and shapes than its model has.

How it happens
The configuration of a 16-bit base was copied beside the weights of a quantising exporter.
A tool that saves weights only left config.json to the person who ran it.

How it is told
By config.json and the headers: no quantization_config, and tensors that only make sense with one. GGUF keeps this in
its own header.

Evidence
codes: how the tensors are stored.

What to do
Write the quantization_config of the tool that quantised the weights into MERGED's config.json.

Seen in
No public report known.
"""

from __future__ import annotations

from lora_check.faults._configs import quantisation
from lora_check.faults._findings import found, listed, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every quantised tensor of a configuration that declares nothing."""
    config = plan.merged_config
    coded = {name: meta.codes for name, meta in plan.merged_metas.items() if meta.codes}
    if not coded or not config or "gguf" in config or quantisation(config):
        return ()
    kinds = sorted(set(coded.values()))
    message = f"{many(len(coded), 'tensor')} stored as {listed(kinds)}, of which MERGED's config.json says nothing"
    return (found(FAULT, message, coded, codes=kinds),)


FAULT = PlanFault(
    code="LC014",
    name="quantisation-not-in-config",
    severity="warning",
    summary="quantised tensors that config.json does not declare",
    help="write the quantization_config of the tool that quantised the weights into MERGED's config.json",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M35",),
)
