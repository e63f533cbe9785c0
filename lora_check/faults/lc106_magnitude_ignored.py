"""LC106 magnitude-ignored

What it is
A DoRA adapter was merged as plain LoRA: the low-rank delta is there, the trained magnitudes are not.

How it happens
The exporter folds lora_A and lora_B and does not know lora_magnitude_vector.
use_dora was lost from the configuration that the merge read.
PEFT 0.13 to 0.15 merge a DoRA embedding so, while their own unmerged forward uses its magnitude.

How it is told
W' = W + s B A reproduces every element, where the right merge is m / |W + s B A| times that.

Evidence
over_budget: elements of the worst target that no honest merge can have written.

What to do
Merge with a PEFT release that knows DoRA, and with use_dora in adapter_config.json.

Seen in
unslothai/unsloth-zoo#828, axolotl-ai-cloud/axolotl#3599, hako-mikan/sd-webui-supermerger#373,
invoke-ai/InvokeAI#9517
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.types import Case, LoadedStep, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B A."""
    if not any("m" in step.factors for step in case.steps):
        return ()
    return (replace(case, steps=tuple(_plain(step) for step in case.steps)),)


def _plain(step: LoadedStep) -> LoadedStep:
    if "m" not in step.factors:
        return step
    return replace(step, recipe=replace(step.recipe, apply=None, columns=None))


FAULT = ValueFault(
    code="LC106",
    name="magnitude-ignored",
    severity="error",
    summary="DoRA magnitude ignored",
    help="merge with a tool that knows DoRA, and with use_dora in adapter_config.json",
    inject=inject,
    causes=("M22",),
)
