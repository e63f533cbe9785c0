"""LC314 quantisation-left-behind

What it is
MERGED holds numbers, and beside them the scales, the tables or the packed copy that the same weights had while they
were quantised.

How it happens
An exporter decoded the weights, merged, and kept every other tensor of the base: loaders then multiply by the scales
once more, or raise a KeyError over half of a scheme (fp8 exports of unsloth and ms-swift).
A merge ran on the float shadow of a packed buffer and both were saved; the runtime takes the packed one, which is that
of BASE (MXFP4 and NVFP4 in Megatron-Bridge, sglang, unsloth).

How it is told
By names alone: tensors such as X.weight_scale, X.SCB, X.weight.absmax or X_blocks in MERGED, where X lies there as
numbers and nothing else explains them. If config.json of MERGED still names a quantisation, it is said.

Evidence
left: how many there are, of how many weights. config: the quantisation that config.json names.

What to do
Delete these tensors and quantization_config from MERGED, or quantise the merged numbers anew.

Seen in
unslothai/unsloth-zoo#803, unslothai/unsloth#4919, modelscope/ms-swift#7907, NVIDIA-NeMo/Megatron-Bridge#5384,
sgl-project/sglang#35970, unslothai/unsloth-zoo#254, unslothai/unsloth-zoo#290, axolotl-ai-cloud/axolotl#3773
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.faults._containers import left_over
from lora_check.faults._findings import found, listed, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with everything that was left."""
    left = left_over(plan)
    if not left:
        return ()
    weights, config = set(left.values()), _named(plan.merged_config)
    message = f"{many(len(left), 'tensor')} of a quantisation left beside the numbers of {many(len(weights), 'weight')}"
    message += f", which config.json of MERGED still says is {config}" if config else ""
    message += f": {listed(left, limit=2)}"
    return (found(FAULT, message, left, left=len(left), weights=len(weights), config=config),)


def _named(config: Mapping[str, Any]) -> str:
    """The method of the quantisation in a configuration; '' for none."""
    said = config.get("quantization_config") or config.get("quantization")
    return str(said.get("quant_method") or "quantised") if isinstance(said, Mapping) else ""


FAULT = PlanFault(
    code="LC314",
    name="quantisation-left-behind",
    severity="error",
    summary="scales or codes left beside numbers",
    help="delete these tensors and quantization_config from MERGED, or quantise the merged numbers anew",
    detect=detect,
    verdict=Verdict.REFUTED,
    causes=("M17", "M28"),
)
