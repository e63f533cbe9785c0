"""Diagnoses and comparisons -> findings: pool what single tensors showed, see patterns over many, tell each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from lora_check import registry
from lora_check.extent import by_kind, marked
from lora_check.types import Comparison, Fault, Finding, PatternFault, Plan, PlanFault, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The mistakes that reproduce one refuted tensor, likeliest first, and the numbers they came with.

    rarity   code -> how many commoner ways the same mistake has
    """

    tensor: str
    codes: tuple[str, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    rarity: Mapping[str, int] = field(default_factory=dict)


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
    """Give each refuted tensor one code: of those that reproduce it, the one that explains most, in its common way."""
    explained = Counter(code for one in diagnoses for code in one.codes)
    rarity = sum((Counter(one.rarity) for one in diagnoses), Counter[str]())

    def claim(code: str) -> tuple[int, int]:
        return explained[code], -rarity[code]

    chosen = {one.tensor: (max(one.codes, key=claim), one.evidence) for one in diagnoses}
    return tuple(_with_code(one, *chosen[one.tensor]) if one.tensor in chosen else one for one in comparisons)


def _with_code(one: Comparison, code: str, evidence: Mapping[str, Any]) -> Comparison:
    return replace(one, code=code, told=evidence.get(code, {}))


def rivals(diagnoses: Sequence[Diagnosis]) -> dict[str, frozenset[str]]:
    """Tensor -> the mistakes that explain it and as many tensors as any other of its mistakes does.

    A mistake that also explains what its rival cannot is no longer one of two; one that explains as many tensors, be
    they the same or others, is.
    """
    explained = Counter(code for one in diagnoses for code in one.codes)
    most = {one.tensor: max(explained[code] for code in one.codes) for one in diagnoses}
    return {one.tensor: frozenset(c for c in one.codes if explained[c] == most[one.tensor]) for one in diagnoses}


def conclude(plan: Plan, comparisons: Sequence[Comparison], diagnoses: Sequence[Diagnosis]) -> tuple[Finding, ...]:
    """One finding for each kind of mistake: structure, patterns over tensors, then the tensors no pattern took over."""
    found, taken, explained = [], set(), set()
    for fault in faults().values():
        if isinstance(fault, PatternFault):
            for finding in fault.detect(plan, comparisons):
                found.append(finding)
                taken |= {(code, name) for code in fault.absorbs for name in finding.tensors}
                explained |= set(fault.absorbs)
    found = [one for one in found if not one.tensors or not {(one.code, t) for t in one.tensors} <= taken]
    shown = [one for one in structural(plan) if one.code not in explained]
    return (*shown, *found, *_by_code(plan, comparisons, diagnoses, taken))


def best_verdict(findings: Sequence[Finding]) -> Verdict:
    """The best verdict that a report with these findings can have."""
    worst = Verdict.VERIFIED
    for finding in findings:
        fault = faults()[finding.code]
        if isinstance(fault, (PlanFault, PatternFault)) and fault.verdict.rank > worst.rank:
            worst = fault.verdict
    return worst


def _by_code(
    plan: Plan, comparisons: Sequence[Comparison], diagnoses: Sequence[Diagnosis], taken: set[tuple[str, str]]
) -> list[Finding]:
    """A finding for each code, and one more for tensors where another code has as good a claim."""
    by_name, equals = {one.tensor: one for one in diagnoses}, rivals(diagnoses)
    groups: dict[str, dict[frozenset[str], list[Comparison]]] = {}
    for one in comparisons:
        if one.code and (one.code, one.tensor) not in taken:
            groups.setdefault(one.code, {}).setdefault(equals[one.tensor], []).append(one)
    return [
        _finding(plan, code, sorted(several - {code}), members, comparisons, by_name)
        for code in sorted(groups)
        for several, members in groups[code].items()
    ]


def _finding(
    plan: Plan,
    code: str,
    also: Sequence[str],
    members: Sequence[Comparison],
    everything: Sequence[Comparison],
    by_name: Mapping[str, Diagnosis],
) -> Finding:
    fault, marks = faults()[code], _ranks(plan)
    names = tuple(one.tensor for one in members)
    where = by_kind(members, everything, marks)
    alike = marked(set(names), marks)
    return Finding(
        code=code,
        name=fault.name,
        severity=fault.severity,
        message=f"{_one_of((code, *also), members, by_name)} in {where}",
        tensors=names,
        help="; ".join(f"if {one}: {faults()[one].help}" for one in (code, *also)) if also else fault.help,
        evidence={
            **_evidence(code, members, by_name),
            **({"just_the_targets_of": alike} if alike and len(set(marks.values())) > 1 else {}),
            **(_undecided(also, names, marks) if also else {}),
        },
    )


def _one_of(codes: Sequence[str], members: Sequence[Comparison], by_name: Mapping[str, Diagnosis]) -> str:
    """What happened; of several mistakes that write the same numbers, each."""
    told = [_summary(code, [by_name[one.tensor].evidence.get(code, {}) for one in members]) for code in codes]
    if len(codes) == 1:
        return told[0]
    return f"one of: {', or '.join(f'{words} ({code})' for words, code in zip(told, codes, strict=True))},"


def _summary(code: str, told: Sequence[Mapping[str, Any]]) -> str:
    """What happened, with what the evidence of these tensors adds to it."""
    tell = getattr(faults()[code], "tell", None)
    return str(tell(told)) if tell else faults()[code].summary


def _undecided(also: Sequence[str], names: Sequence[str], marks: Mapping[str, str]) -> dict[str, Any]:
    """The other mistakes that explain every one of these tensors as well, and what would tell them apart."""
    same = sorted({marks[name] for name in names if name in marks})
    others = f"targets that are not of {same[0]}, or " if len(same) == 1 else ""
    return {"also": list(also), "would_tell": f"{others}the script that merged"}


def _ranks(plan: Plan) -> dict[str, str]:
    """Tensor -> 'rank 16', or 'rank 16 and alpha 32' where targets of one rank have several alphas."""
    scales = {
        one.merged.name: step.scale for one in plan.pairings for step in one.steps if step.scale and step.scale.rank
    }
    several = len({(one.rank, one.alpha) for one in scales.values()}) > len({one.rank for one in scales.values()})
    return {
        name: f"rank {one.rank} and alpha {one.alpha:g}" if several else f"rank {one.rank}"
        for name, one in scales.items()
    }


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
