"""Name the mistake.

A refuted tensor is replayed under every mistake that has a forward model: discrete ones first, in the order of their
codes, then the one with a free number. Which mistake, done in any honest arithmetic, writes these very bits? Where
several do, tensors are pooled: the mistake that explains most of them is named, and the others are told beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf
from typing import Any

from torch import Tensor

from lora_check.compare import factor_range, reproduces
from lora_check.findings import Diagnosis, faults
from lora_check.replay import name_of
from lora_check.rounding import FREE_NUMBERS
from lora_check.types import Arithmetic, Case, Kind, ValueFault

NOT_FINITE, UNEXPLAINED, FITTED = "LC130", "LC199", "LC110"
LARGEST_DENOMINATOR = 64
"""A fitted factor is told as a fraction up to this denominator if one lies in its range, else as the range's middle."""


def name_tensor(
    name: str, kind: Kind, case: Case, actual: Tensor, orders: Sequence[Arithmetic], over_budget: int
) -> Diagnosis | None:
    """The mistakes that wrote this tensor; LC199 for a target or copy that none explains, None for such a bystander."""
    codes, evidence = [], {}
    for code, fault in faults().items():
        if isinstance(fault, ValueFault) and kind in fault.kinds:
            tried = [_exchanged(one, actual) if fault.exchanged else (one, actual) for one in fault.inject(case)]
            found = [how for changed, seen in tried if (how := reproduces(changed, seen, orders))]
            if found:
                codes.append(code)
                evidence[code] = {"arithmetic": found[0].name}
    fits = not codes and kind == "target" and over_budget > FREE_NUMBERS
    if fits and (fitted := _fit(case, actual, orders)):
        codes, evidence = [FITTED], {FITTED: fitted}
    if not codes and kind == "bystander":
        return None
    return Diagnosis(tensor=name, codes=tuple(codes) or (UNEXPLAINED,), evidence=evidence)


def _exchanged(case: Case, actual: Tensor) -> tuple[Case, Tensor]:
    """The case that asks whether BASE is what an honest merge into MERGED would have written."""
    return replace(case, base=actual, storage=name_of(case.base.dtype)), case.base


def not_finite(name: str, count: int) -> Diagnosis:
    """LC130: the merged tensor holds NaN or infinity."""
    return Diagnosis(tensor=name, codes=(NOT_FINITE,), evidence={NOT_FINITE: {"elements": count}})


def _fit(case: Case, actual: Tensor, orders: Sequence[Arithmetic]) -> dict[str, Any] | None:
    """The factor on the delta under which the tensor is reproduced, if there is one."""
    fit = getattr(faults().get(FITTED), "fit", None)
    if fit is None or any(step.recipe.apply for step in case.steps):
        return None
    for roundings in (0, 2):
        low, high = factor_range(case, actual, roundings)
        for factor in _candidates(low, high):
            if how := reproduces(fit(case, factor), actual, orders):
                return {"factor": factor, "factor_low": low, "factor_high": high, "arithmetic": how.name}
    return None


def _candidates(low: float, high: float) -> list[float]:
    """The simplest fraction between two bounds, and their middle."""
    if not (-inf < low <= high < inf):
        return []
    middle = (low + high) / 2
    simple = [n / d for d in range(1, LARGEST_DENOMINATOR + 1) if (n := ceil(low * d)) <= high * d]
    return [*simple[:1], middle]
