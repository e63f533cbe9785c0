"""LC316 scaled-embedding

What it is
The adapter changes an embedding whose output the model multiplies by a constant. Whether the adapter's part was
multiplied too, while it was trained, depends on the release of PEFT; the merged weight always is.

How it happens
Gemma 3 multiplies its embedding by the square root of the hidden size, BART-like models do with scale_embedding.
PEFT up to 0.17 left the factor out of the unmerged forward, and merged as it does today: the merged model applies the
embedding's delta that many times stronger than training did. From 0.18 on both have it.

How it is told
By model_type, scale_embedding, and the release that the adapter's configuration names; only 0.18 and later write it.
The weights are checked by the formula of the merge.

Evidence
model_type: the architecture. producer: the release, where it is known.

What to do
Compare the outputs of the merged model with those of the adapter under the PEFT that trained it.

Seen in
huggingface/peft#2809, huggingface/peft#2825, huggingface/peft#2831, huggingface/peft#2839
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_check.faults._configs import model_types, said
from lora_check.faults._findings import found, many
from lora_check.types import Finding, Plan, PlanFault, Verdict

ALWAYS = ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "t5gemma2")
ASKED = (
    "bart",
    "bigbird_pegasus",
    "biogpt",
    "blenderbot",
    "m2m_100",
    "mbart",
    "nllb-moe",
    "pegasus_x",
    "plbart",
    "xglm",
)
"""Architectures whose embedding layer multiplies its own output: always, or where scale_embedding says so."""

FIRST_RIGHT = (0, 18)
"""The release of PEFT whose unmerged forward multiplies the adapter's part too."""


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every such target of an adapter that such a release may have trained."""
    names = [one.merged.name for one in plan.targets if "embedding" in one.recipe]
    kinds = _scaled(plan.base_config)
    if not names or not kinds or all(_is_later(one.config.producer) for one in plan.adapters):
        return ()
    message = (
        f"{many(len(names), 'embedding')} of {kinds} adapted, whose output is scaled: PEFT up to 0.17 did not scale "
    )
    producers = [one.config.producer for one in plan.adapters if one.config.producer]
    return (found(FAULT, message + "the adapter's part in training", names, model_type=kinds, producer=producers),)


def _scaled(config: Mapping[str, Any]) -> str:
    """The architecture, if it scales its embedding."""
    asked = ASKED if said(config, "scale_embedding") else ()
    return next((kind for kind in sorted(model_types(config)) if kind in (*ALWAYS, *asked)), "")


def _is_later(producer: str) -> bool:
    release = re.match(r"peft (\d+)\.(\d+)", producer)
    return release is not None and (int(release[1]), int(release[2])) >= FIRST_RIGHT


FAULT = PlanFault(
    code="LC316",
    name="scaled-embedding",
    severity="info",
    summary="an adapted embedding whose output the model scales",
    help="compare the outputs of the merged model with those of the adapter under the PEFT that trained it",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M34",),
)
