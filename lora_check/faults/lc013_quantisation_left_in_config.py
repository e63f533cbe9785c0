"""LC013 quantisation-left-in-config

What it is
MERGED's config.json has a quantization_config, and its tensors are plain numbers. A loader quantises them again, so
that the model is not the one in the file, or refuses them.

How it happens
A model that was loaded in 4 or 8 bit was merged, dequantised and saved with the configuration it was loaded with.
The configuration of a quantised base was copied beside the weights of an exporter.
With bitsandbytes, transformers quantises on loading, and a delta below the step of the grid is lost; GPTQ, AWQ and FP8
loaders look for packed tensors and scales, which are not there.

How it is told
By config.json and the headers. Where BASE is the same way, this is no mistake of the merge.

Evidence
method: what the configuration says.

What to do
Delete quantization_config from MERGED's config.json.

Seen in
unslothai/unsloth-zoo#803, unslothai/unsloth#4919, hiyouga/LlamaFactory#10328
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.faults._configs import quantisation
from lora_check.faults._findings import found
from lora_check.types import FLOATS, Finding, Plan, PlanFault, TensorMeta, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding where MERGED is declared quantised and is not, unless BASE is so too."""
    config = plan.merged_config
    if not _contradicts(config, plan.merged_metas) or _contradicts(plan.base_config, plan.base_metas):
        return ()
    method = quantisation(config)
    return (found(FAULT, f"MERGED's config.json declares {method}, and its tensors are plain numbers", method=method),)


def _contradicts(config: Mapping[str, Any], metas: Mapping[str, TensorMeta]) -> bool:
    plain = all(meta.dtype in FLOATS and not meta.codes for meta in metas.values() if len(meta.shape) > 1)
    return bool(quantisation(config)) and plain


FAULT = PlanFault(
    code="LC013",
    name="quantisation-left-in-config",
    severity="error",
    summary="a quantization_config beside tensors that are plain numbers",
    help="delete quantization_config from MERGED's config.json",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M35",),
)
