"""LC110 wrong-scale

What it is
The right delta was added with a scale that no known formula gives.

How it happens
A strength was left on while merging: cross_attention_kwargs, a lora_scale, the ratio of a web interface.
The export script has alpha and r written into it (16 / 8, 32 / 16) and does not read adapter_config.json.
The checkpoint on disk was trained or merged with another alpha than the configuration says.
Several adapters were averaged, or a sum over the devices of a group counted the delta once for each.

How it is told
A factor k is fitted and W' = W + k s B A then reproduces every element, bit for bit or within a budget narrower
than the delta. It is tried after every mistake that has no free number, so k is not one of those. A scale that is
the same in modules whose right scales differ was written into a script; a factor that is the same everywhere was
multiplied in.

Evidence
scale, right: the scale that fits, and the right one. factor: the one over the other; factor_low, factor_high:
the range that fits as well.

What to do
Look for the scale that was used, or the factor, in the command or script that merged; if the factor was
meant, pass it with --weights.

Seen in
kohya-ss/sd-scripts#868, tloen/alpaca-lora#272, hf-lin/ChatMusician#12, cloneofsimo/lora#187
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from lora_check.faults._cases import deltas, never
from lora_check.faults._said import number, numbers
from lora_check.types import Case, LoadedStep, ValueFault

DIGITS = 17
"""Enough to write any float64 as it is."""


def fit(case: Case, factor: float) -> Case:
    """W' = W + k s B A."""
    scales = {step.s for step in deltas(case) if step.scale}
    right = scales.pop() if len(scales) == 1 else None
    told = {} if right is None else {"scale": factor * right, "right": right}
    return replace(case, steps=tuple(_weighted(step, factor) for step in case.steps), told=told)


def _weighted(step: LoadedStep, factor: float) -> LoadedStep:
    if step.scale is None:
        return step
    return replace(step, scale=replace(step.scale, weight=step.scale.weight * factor))


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'scale 2 in place of 1.667, 1.2 times too large', as far as all tensors agree on it."""
    factor = _common(told)
    size = "" if factor is None else _size(factor)
    known = all("right" in one for one in told)
    scale = _common(told, "right") if known else None
    if scale is None:
        spread = f"scales {numbers(one['factor'] for one in told)} times the right ones"
        return f"wrong scale, {size}" if size else spread
    rights = numbers(one["right"] for one in told)
    return ", ".join(part for part in (f"scale {number(scale)} in place of {rights}", size) if part)


def _size(factor: float) -> str:
    return f"{number(factor)} times too large" if factor > 1 else f"{number(factor)} times the right one"


def _common(told: Sequence[Mapping[str, Any]], unit: str = "") -> float | None:
    """The number with the fewest digits within the ranges of all tensors, each times its own `unit`, if there is one.

    In float32 a range is narrower than what rounding the scale itself moves, so numbers that are told alike agree too.
    """
    low, high, said = -inf, inf, set()
    for one in told:
        ends = sorted(one[key] * one.get(unit, 1.0) for key in ("factor_low", "factor_high"))
        low, high = max(low, ends[0]), min(high, ends[1])
        said.add(number(one["factor"] * one.get(unit, 1.0)))
    if not -inf < low <= high < inf:
        return float(said.pop()) if len(said) == 1 else None
    middle = (low + high) / 2
    shortened = (float(f"{middle:.{digits}g}") for digits in range(1, DIGITS))
    return next((one for one in shortened if low <= one <= high), middle)


FAULT = ValueFault(
    code="LC110",
    name="wrong-scale",
    severity="error",
    summary="wrong scale",
    help="look for that scale or factor in the command that merged, or pass it with --weights if it was meant",
    inject=never,
    fit=fit,
    tell=tell,
    causes=("M10", "M30", "M38"),
)
