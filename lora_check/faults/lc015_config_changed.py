"""LC015 config-changed

What it is
MERGED's config.json gives a number of the model another value than BASE's. The weights may be the exact merge, and the
model that is built around them computes something else.

How it happens
The exporter built the configuration anew from its own defaults, or took that of a sibling model: another rope_theta,
rope_scaling, sliding window, activation or epsilon.
A context was stretched on purpose while the model was merged.

How it is told
The keys that change what is computed from the same weights are compared where both files set them, those of the text
part too.

Evidence
changed: each key with its value in BASE and in MERGED.

What to do
Take MERGED's config.json from BASE, unless the change was meant.

Seen in
QwenLM/Qwen-VL#302
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_check.faults._configs import TEXT
from lora_check.faults._findings import found, listed
from lora_check.types import Finding, Plan, PlanFault, Verdict

COMPUTING = (
    "attention_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "logits_scaling",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_key_value_heads",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_pct",
    "scale_embedding",
    "sliding_window",
    "use_sliding_window",
)
"""The keys that change what a model computes from the same weights."""


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every key that both set and that differs."""
    changed = dict(_changed(plan.base_config, plan.merged_config))
    if not changed:
        return ()
    told = [f"{key} {new}, {old} in BASE" for key, (old, new) in changed.items()]
    message = f"MERGED's config.json says otherwise than BASE's: {listed(told, limit=3)}"
    return (found(FAULT, message, changed={key: list(values) for key, values in changed.items()}),)


def _changed(base: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in COMPUTING:
        old, new = base.get(key), merged.get(key)
        if old is not None and new is not None and old != new:
            yield key, (old, new)
    for part in TEXT:
        old, new = base.get(part), merged.get(part)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changed(old, new)


FAULT = PlanFault(
    code="LC015",
    name="config-changed",
    severity="warning",
    summary="a configuration that makes another model of the same weights",
    help="take MERGED's config.json from BASE, unless the change was meant",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M35",),
)
