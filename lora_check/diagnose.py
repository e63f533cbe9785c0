"""Name the mistake.

A refuted tensor is replayed under every mistake that has a forward model: discrete ones first, in the order of their
codes, then the one with a free number. Which mistake, done in any honest arithmetic, writes these very bits? Where
several do, tensors are pooled: the mistake that explains most of them is named, and the others are told beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

from torch import Tensor

from lora_check.compare import Match, Measure, factor_range, reproduces
from lora_check.findings import Diagnosis, faults
from lora_check.replay import name_of
from lora_check.rounding import FREE_NUMBERS, arithmetics
from lora_check.types import Arithmetic, Case, Kind, ValueFault

NOT_FINITE, UNEXPLAINED, FITTED = "LC130", "LC199", "LC110"
LARGEST_DENOMINATOR = 64
"""A fitted factor is told as a fraction up to this denominator if one lies in its range, else as the range's middle."""


def name_tensor(
    name: str, kind: Kind, case: Case, actual: Tensor, orders: Sequence[Arithmetic], measure: Measure
) -> Diagnosis | None:
    """The mistakes that wrote this tensor; LC199 for a target or copy that none explains, None for such a bystander."""
    matches = _matches(kind, case, actual, orders, measure.signal or inf)
    if matches:
        codes = sorted(matches, key=lambda code: not matches[code].match.exact)
        return Diagnosis(tensor=name, codes=tuple(codes), evidence={code: matches[code].evidence for code in codes})
    fits = kind == "target" and measure.over_budget > FREE_NUMBERS
    if fits and (fitted := _fit(case, actual, orders, measure)):
        return Diagnosis(tensor=name, codes=(FITTED,), evidence={FITTED: fitted})
    if traces := _recognised(kind, case, actual):
        return Diagnosis(tensor=name, codes=tuple(traces), evidence=traces)
    return None if kind == "bystander" else Diagnosis(tensor=name, codes=(UNEXPLAINED,))


@dataclass(frozen=True, slots=True)
class Way:
    """One way of one mistake that reproduces a tensor, and what it has to say."""

    match: Match
    told: Mapping[str, Any]

    @property
    def evidence(self) -> dict[str, Any]:
        return {**self.told, "arithmetic": self.match.arithmetic.name}


def _matches(kind: Kind, case: Case, actual: Tensor, orders: Sequence[Arithmetic], widest: float) -> dict[str, Way]:
    """Every mistake that reproduces the tensor, known better than the delta is large, and how its best way does."""
    found: dict[str, Way] = {}
    for code, fault in faults().items():
        if isinstance(fault, ValueFault) and kind in fault.kinds:
            tried = [_exchanged(one, actual) if fault.exchanged else (one, actual) for one in fault.inject(case)]
            ways = [
                Way(match, changed.told)
                for changed, seen in tried
                if (match := reproduces(changed, seen, _orders(changed, orders), widest))
            ]
            if ways:
                found[code] = min(ways, key=lambda way: not way.match.exact)
    return found


def _recognised(kind: Kind, case: Case, actual: Tensor) -> dict[str, Mapping[str, Any]]:
    """The mistakes whose traces a tensor bears though their inputs are not at hand."""
    told = {
        code: fault.recognise(case, actual)
        for code, fault in faults().items()
        if isinstance(fault, ValueFault) and kind in fault.kinds and fault.recognise
    }
    return {code: evidence for code, evidence in told.items() if evidence is not None}


def _exchanged(case: Case, actual: Tensor) -> tuple[Case, Tensor]:
    """The case that asks whether BASE is what an honest merge into MERGED would have written."""
    return replace(case, base=actual, storage=name_of(case.base.dtype), grid=None), case.base


def _orders(case: Case, orders: Sequence[Arithmetic]) -> Sequence[Arithmetic]:
    """The orders a changed case may have been merged in: those of the dtype its model was held in."""
    return arithmetics(case.held, case.held) if case.held else orders


def not_finite(name: str, count: int) -> Diagnosis:
    """LC130: the merged tensor holds NaN or infinity."""
    return Diagnosis(tensor=name, codes=(NOT_FINITE,), evidence={NOT_FINITE: {"elements": count}})


def _fit(case: Case, actual: Tensor, orders: Sequence[Arithmetic], measure: Measure) -> dict[str, Any] | None:
    """The factor on the delta under which the tensor is reproduced, if there is one."""
    fit = getattr(faults().get(FITTED), "fit", None)
    if fit is None or any(step.recipe.apply for step in case.steps):
        return None
    likely = measure.overlap / measure.signal if measure.signal > 0 else 0.0
    for roundings in (0, 2):
        low, high = factor_range(case, actual, likely, roundings)
        for factor in _candidates(low, high, likely):
            match = reproduces(fit(case, factor), actual, orders)
            if match and (roundings or match.arithmetic.delta != "always"):
                return {"factor": factor, "factor_low": low, "factor_high": high, "arithmetic": match.arithmetic.name}
    return None


def _candidates(low: float, high: float, likely: float) -> list[float]:
    """The simplest fraction between two bounds, the least-squares factor, and the middle."""
    if not (-inf < low <= high < inf):
        return []
    middle = (low + high) / 2
    simple = [n / d for d in range(1, LARGEST_DENOMINATOR + 1) if (n := ceil(low * d)) <= high * d]
    return list(dict.fromkeys([*simple[:1], min(max(likely, low), high), middle]))
