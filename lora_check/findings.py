"""Diagnoses and comparisons -> findings: pool what single tensors showed, see patterns over many, tell each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from lora_check import registry
from lora_check.types import Comparison, Fault, Finding, PatternFault, Plan, PlanFault, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The mistakes that reproduce one refuted tensor, likeliest first, and the numbers they came with."""

    tensor: str
    codes: tuple[str, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)


def faults() -> Mapping[str, Fault]:
    """Every fault by its code, in the order of the codes."""
    return registry.load("faults")


def structural(plan: Plan) -> tuple[Finding, ...]:
    """What headers and configurations alone show."""
    found: list[Finding] = []
    for fault in faults().values():
        if isinstance(fault, PlanFault):
            found += fault.detect(plan)
    return tuple(found)


def assign(comparisons: Sequence[Comparison], diagnoses: Sequence[Diagnosis]) -> tuple[Comparison, ...]:
    """Give each refuted tensor one code: of those that reproduce it, the one that explains most tensors."""
    explained = Counter(code for one in diagnoses for code in one.codes)
    chosen = {one.tensor: (max(one.codes, key=lambda code: explained[code]), one.evidence) for one in diagnoses}
    return tuple(_with_code(one, *chosen[one.tensor]) if one.tensor in chosen else one for one in comparisons)


def _with_code(one: Comparison, code: str, evidence: Mapping[str, Any]) -> Comparison:
    return replace(one, code=code, told=evidence.get(code, {}))


def conclude(plan: Plan, comparisons: Sequence[Comparison], diagnoses: Sequence[Diagnosis]) -> tuple[Finding, ...]:
    """One finding for each kind of mistake: structure, patterns over tensors, then the tensors no pattern took over."""
    found, taken = [], set()
    for fault in faults().values():
        if isinstance(fault, PatternFault):
            for finding in fault.detect(plan, comparisons):
                found.append(finding)
                taken |= {(code, name) for code in fault.absorbs for name in finding.tensors}
    found = [one for one in found if not one.tensors or not {(one.code, t) for t in one.tensors} <= taken]
    return (*structural(plan), *found, *_by_code(comparisons, diagnoses, taken))


def best_verdict(findings: Sequence[Finding]) -> Verdict:
    """The best verdict that a report with these findings can have."""
    worst = Verdict.VERIFIED
    for finding in findings:
        fault = faults()[finding.code]
        if isinstance(fault, (PlanFault, PatternFault)) and fault.verdict.rank > worst.rank:
            worst = fault.verdict
    return worst


def _by_code(
    comparisons: Sequence[Comparison], diagnoses: Sequence[Diagnosis], taken: set[tuple[str, str]]
) -> list[Finding]:
    by_name = {one.tensor: one for one in diagnoses}
    groups: dict[str, list[Comparison]] = {}
    for one in comparisons:
        if one.code and (one.code, one.tensor) not in taken:
            groups.setdefault(one.code, []).append(one)
    return [_finding(code, groups[code], comparisons, by_name) for code in sorted(groups)]


def _finding(
    code: str, members: Sequence[Comparison], everything: Sequence[Comparison], by_name: Mapping[str, Diagnosis]
) -> Finding:
    fault = faults()[code]
    kinds = {one.kind for one in members}
    others = sum(one.kind in kinds for one in everything)
    noun = {frozenset({"target"}): "targets", frozenset({"copy"}): "saved tensors"}.get(frozenset(kinds), "tensors")
    also = _also(code, [by_name[one.tensor] for one in members])
    summary = _summary(code, members) if not also else f"one of: {', '.join(faults()[c].name for c in (code, *also))},"
    extent = f"all {others} {noun}" if len(members) == others else f"{len(members)} of {others} {noun}"
    return Finding(
        code=code,
        name=fault.name,
        severity=fault.severity,
        message=f"{summary} in {extent}",
        tensors=tuple(one.tensor for one in members),
        help=fault.help,
        evidence=_evidence(code, members, by_name) | ({"also": list(also)} if also else {}),
    )


def _summary(code: str, members: Sequence[Comparison]) -> str:
    """What happened, with what the evidence of these tensors adds to it."""
    fault = faults()[code]
    tell = getattr(fault, "tell", None)
    return str(tell([one.told for one in members])) if tell else fault.summary


def _also(code: str, diagnoses: Sequence[Diagnosis]) -> tuple[str, ...]:
    """The other mistakes that explain every one of these tensors as well."""
    common = set.intersection(*(set(one.codes) for one in diagnoses))
    return tuple(sorted(common - {code}))


def _evidence(code: str, members: Sequence[Comparison], by_name: Mapping[str, Diagnosis]) -> dict[str, Any]:
    worst = max(members, key=lambda one: one.over_budget / max(1, prod(one.shape)))
    evidence: dict[str, Any] = {
        "worst_tensor": worst.tensor,
        "over_budget": worst.over_budget,
        "elements": prod(worst.shape),
    }
    if worst.worst:
        evidence["times_budget"] = worst.worst
    if worst.residual is not None:
        evidence["residual_over_delta"] = worst.residual
    if worst.survival is not None:
        evidence["survival"] = worst.survival
    return evidence | dict(by_name[worst.tensor].evidence.get(code, {}))
