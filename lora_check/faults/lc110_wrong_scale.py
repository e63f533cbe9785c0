"""LC110 wrong-scale

What it is
The right delta was added with a scale that no known formula gives.

How it happens
A strength or weight was left on while merging, or was applied to both factors and so squared.
The export script has alpha and r written into it and does not read adapter_config.json.
The checkpoint on disk was trained or merged with another alpha than the configuration says.

How it is told
A factor k is fitted and W' = W + k s B A then reproduces every element. It is tried after every mistake
that has no free number, so k is not one of those.

Evidence
factor: the fitted k; 1 would be right. factor_low, factor_high: the range that fits as well.

What to do
Look for the number k, its square or its root in the command that merged, or pass it with --weights if it
was meant.

Seen in
kohya-ss/sd-scripts#868, tloen/alpaca-lora#272, hf-lin/ChatMusician#12, cloneofsimo/lora#187
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import never
from lora_check.types import Case, LoadedStep, ValueFault


def fit(case: Case, factor: float) -> Case:
    """W' = W + k s B A."""
    return replace(case, steps=tuple(_weighted(step, factor) for step in case.steps))


def _weighted(step: LoadedStep, factor: float) -> LoadedStep:
    if step.scale is None:
        return step
    return replace(step, scale=replace(step.scale, weight=step.scale.weight * factor))


FAULT = ValueFault(
    code="LC110",
    name="wrong-scale",
    severity="error",
    summary="wrong scale",
    help="look for the fitted factor in the command that merged, or pass it with --weights if it was meant",
    inject=never,
    fit=fit,
)
