"""Name the mistake.

A refuted tensor is replayed under every mistake that has a forward model: discrete ones first, in the order of their
codes, then the one with a free number. Which mistake, done in any honest arithmetic, writes these very bits? Where
several do, tensors are pooled: the mistake that explains most of them is named, and the others are told beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

from torch import Tensor

from lora_check.compare import Match, Measure, factor_range, reproduces, writes
from lora_check.findings import Diagnosis, faults
from lora_check.number_kinds import name_of
from lora_check.rounding import FREE_NUMBERS, arithmetics
from lora_check.types import Arithmetic, Case, Kind, ValueFault

NOT_FINITE, UNEXPLAINED, FITTED = "LC130", "LC199", "LC110"
LARGEST_DENOMINATOR = 64
"""A fitted factor is told as a fraction up to this denominator if one lies in its range, else as the range's middle."""


Known = Mapping[str, Sequence[Mapping[str, Any]]]
"""Code -> the different pieces of evidence with which it was found in other tensors."""


def name_tensor(
    name: str,
    kind: Kind,
    case: Case,
    actual: Tensor,
    orders: Sequence[Arithmetic],
    measure: Measure,
    known: Known | None = None,
) -> Diagnosis | None:
    """The mistakes that wrote this tensor; LC199 for a target or copy that none explains, None for such a bystander.

    known   the mistakes found in other tensors: it is asked about these alone, and None says that it was none of them
    """
    matches = _matches(kind, case, actual, orders, measure.signal or inf, known)
    if matches:
        codes = sorted(matches, key=lambda code: (not matches[code].match.exact, matches[code].place))
        return Diagnosis(
            tensor=name,
            codes=tuple(codes),
            evidence={code: matches[code].evidence for code in codes},
            rarity={code: matches[code].place for code in codes},
        )
    if (
        kind == "target"
        and measure.over_budget > FREE_NUMBERS
        and (fitted := _fitted(case, actual, orders, measure, known))
    ):
        return Diagnosis(tensor=name, codes=(FITTED,), evidence={FITTED: fitted})
    if traces := _recognised(kind, case, actual, known):
        return Diagnosis(tensor=name, codes=tuple(traces), evidence=traces)
    return None if kind == "bystander" or known is not None else unexplained(name)


def unexplained(name: str, *, in_full: bool = True) -> Diagnosis:
    """LC199: nothing that is known wrote this tensor, or nothing of what was found in the tensors asked `in_full`."""
    return Diagnosis(tensor=name, codes=(UNEXPLAINED,), evidence={} if in_full else {UNEXPLAINED: {"in_full": False}})


@dataclass(frozen=True, slots=True)
class Way:
    """One way of one mistake that reproduces a tensor, and what it has to say; `place` counts from the commonest."""

    match: Match
    told: Mapping[str, Any]
    place: int

    @property
    def evidence(self) -> dict[str, Any]:
        return {**self.told, "arithmetic": self.match.arithmetic.name}


def _asked(kind: Kind, known: Known | None) -> Iterator[tuple[str, ValueFault]]:
    """The mistakes that can happen to such a tensor, in the order of their codes."""
    for code, fault in faults().items():
        if isinstance(fault, ValueFault) and kind in fault.kinds and (known is None or code in known):
            yield code, fault


def _matches(
    kind: Kind, case: Case, actual: Tensor, orders: Sequence[Arithmetic], widest: float, known: Known | None
) -> dict[str, Way]:
    """Every mistake that reproduces the tensor, known better than the delta is large, and how its best way does.

    Where one gives the very bits, another one that only may have written them is no equal of it.
    """
    found: dict[str, Way] = {}
    exact = False
    for code, fault in _asked(kind, known):
        likely = {one.get("arithmetic") for one in (known or {}).get(code, ())}
        for place, one in enumerate(fault.inject(case)):
            changed, seen = _exchanged(one, actual) if fault.exchanged else (one, actual)
            match = _reproduces(changed, seen, _orders(changed, orders), widest, likely, bit_by_bit=exact)
            if match and (code not in found or match.exact):
                found[code] = Way(match, changed.told, place)
            if match and match.exact:
                exact = True
                break
    return {code: way for code, way in found.items() if way.match.exact or not exact}


def _reproduces(
    case: Case,
    actual: Tensor,
    orders: Sequence[Arithmetic],
    widest: float,
    likely: Collection[str | None],
    *,
    bit_by_bit: bool = False,
) -> Match | None:
    """`reproduces`, with the arithmetics that made other tensors tried first, bit by bit and nothing more."""
    for how in orders:
        if how.name in likely and writes(case, actual, how):
            return Match(how, True)
    return reproduces(case, actual, orders, widest, bit_by_bit=bit_by_bit)


def _recognised(kind: Kind, case: Case, actual: Tensor, known: Known | None) -> dict[str, Mapping[str, Any]]:
    """The mistakes whose traces a tensor bears though their inputs are not at hand."""
    told = {code: fault.recognise(case, actual) for code, fault in _asked(kind, known) if fault.recognise}
    return {code: evidence for code, evidence in told.items() if evidence is not None}


def _exchanged(case: Case, actual: Tensor) -> tuple[Case, Tensor]:
    """The case that asks whether BASE is what an honest merge into MERGED would have written."""
    return replace(case, base=actual, storage=name_of(case.base.dtype), grid=None), case.base


def _orders(case: Case, orders: Sequence[Arithmetic]) -> Sequence[Arithmetic]:
    """The orders a changed case may have been merged in: those of the dtype its model was held in."""
    return arithmetics(case.held, case.held) if case.held else orders


def not_finite(name: str, count: int, sources: Mapping[str, int] | None = None) -> Diagnosis:
    """LC130: the merged tensor holds NaN or infinity.

    sources   where they come from -> how many, if that was asked
    """
    told = {"elements": count, **({"sources": dict(sources)} if sources else {})}
    return Diagnosis(tensor=name, codes=(NOT_FINITE,), evidence={NOT_FINITE: told})


def _fitted(
    case: Case, actual: Tensor, orders: Sequence[Arithmetic], measure: Measure, known: Known | None
) -> dict[str, Any] | None:
    """The factor on the delta under which the tensor is reproduced, if there is one: any, or one found elsewhere."""
    fit = getattr(faults().get(FITTED), "fit", None)
    if fit is None or any(step.recipe.apply for step in case.steps):
        return None
    if known is None:
        return _fit(fit, case, actual, orders, measure)
    for one in known.get(FITTED, ()):
        changed = fit(case, one["factor"])
        if match := _reproduces(changed, actual, orders, _widest(measure, one["factor"]), {one["arithmetic"]}):
            return {**one, **changed.told, "arithmetic": match.arithmetic.name}
    return None


def _fit(
    fit: Callable[[Case, float], Case], case: Case, actual: Tensor, orders: Sequence[Arithmetic], measure: Measure
) -> dict[str, Any] | None:
    likely = measure.overlap / measure.signal if measure.signal > 0 else 0.0
    for roundings in (0, 2):
        low, high = factor_range(case, actual, likely, roundings)
        if inf > low > high > -inf:  # by a hair, where the reach was that of a smaller factor
            low, high = factor_range(case, actual, (low + high) / 2, roundings)
        for factor in _candidates(low, high, likely):
            changed = fit(case, factor)
            match = reproduces(changed, actual, orders, _widest(measure, factor))
            if match and (roundings or match.arithmetic.delta != "always"):
                range_told = {"factor": factor, "factor_low": low, "factor_high": high}
                return {**changed.told, **range_told, "arithmetic": match.arithmetic.name}
    return None


def _widest(measure: Measure, factor: float) -> float:
    """The square of the smaller of the right delta and the fitted one: a budget as wide as that shows neither."""
    return measure.signal * min(1.0, factor * factor)


def _candidates(low: float, high: float, likely: float) -> list[float]:
    """The simplest fraction between two bounds, the least-squares factor, and the middle."""
    if not (-inf < low <= high < inf):
        return []
    middle = (low + high) / 2
    simple = [n / d for d in range(1, LARGEST_DENOMINATOR + 1) if (n := ceil(low * d)) <= high * d]
    return list(dict.fromkeys([*simple[:1], min(max(likely, low), high), middle]))
