"""Report: everything a renderer sees, and its JSON form (schema 1; keys are added, never renamed)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lora_check.reading.throughput import Throughput, speed
from lora_check.types import Comparison, Finding, RunInfo, Verdict

SCHEMA = 1

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The targets of one module name, counted and pooled."""

    name: str
    targets: int
    verified: int
    refuted: int
    inconclusive: int
    survival: float | None
    snr_db: float | None
    worst: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of one check.

    withheld    how many findings --select and --ignore keep from the list
    throughput  how fast the tensors were read and compared; None: nothing timed it
    """

    run: RunInfo
    comparisons: tuple[Comparison, ...]
    findings: tuple[Finding, ...]
    verdict: Verdict
    withheld: int = 0
    throughput: Throughput | None = None

    @property
    def exit_code(self) -> int:
        return self.verdict.exit_code

    @property
    def families(self) -> tuple[Family, ...]:
        """The families in the order of their first target."""
        groups: dict[str, list[Comparison]] = {}
        for one in self.comparisons:
            if one.kind == "target":
                groups.setdefault(one.family, []).append(one)
        return tuple(_family(name, members) for name, members in groups.items())

    @property
    def survival(self) -> float | None:
        return pooled_survival(self.comparisons)

    def count(self, verdict: Verdict) -> int:
        """How many tensors have this verdict."""
        return sum(one.verdict is verdict for one in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """The report as the JSON contract has it."""
        return {
            "schema": SCHEMA,
            "tool": dict(self.run.tool),
            "command": self.run.command,
            "inputs": {
                "base": dict(self.run.base),
                "adapters": [dict(one) for one in self.run.adapters],
                "merged": dict(self.run.merged),
            },
            "verdict": self.verdict.value,
            "exit_code": self.exit_code,
            "summary": _summary(self),
            "families": [_family_dict(one) for one in self.families],
            "findings": [finding_as_dict(one) for one in self.findings],
            "findings_withheld": self.withheld,
            "tensors": [_tensor_dict(one) for one in self.comparisons],
        }


def pooled_survival(comparisons: Iterable[Comparison]) -> float | None:
    """sum <merged - base, delta> / sum <delta, delta> over the targets; None without a delta."""
    targets = [one for one in comparisons if one.kind == "target"]
    signal = math.fsum(one.signal for one in targets)
    return math.fsum(one.overlap for one in targets) / signal if signal > 0 else None


def pooled_snr_db(comparisons: Iterable[Comparison]) -> float | None:
    """10 log10(sum |delta|^2 / sum |residual|^2) over the targets; None where nothing was lost or nothing was there."""
    targets = [one for one in comparisons if one.kind == "target"]
    signal, noise = math.fsum(one.signal for one in targets), math.fsum(one.noise for one in targets)
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def arithmetic_counts(comparisons: Iterable[Comparison]) -> dict[str, int]:
    """How many verified targets each arithmetic reproduced, most first."""
    counts: dict[str, int] = {}
    for one in comparisons:
        if one.kind == "target" and one.arithmetic and one.verdict is not Verdict.REFUTED:
            counts[one.arithmetic] = counts.get(one.arithmetic, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _family(name: str, members: Sequence[Comparison]) -> Family:
    verdicts = [one.verdict for one in members]
    return Family(
        name=name,
        targets=len(members),
        verified=verdicts.count(Verdict.VERIFIED),
        refuted=verdicts.count(Verdict.REFUTED),
        inconclusive=verdicts.count(Verdict.INCONCLUSIVE),
        survival=pooled_survival(members),
        snr_db=pooled_snr_db(members),
        worst=max((one.worst for one in members), default=None),
    )


def _summary(report: Report) -> dict[str, Any]:
    kinds = [one.kind for one in report.comparisons]
    return {
        "tensors": len(kinds),
        "targets": kinds.count("target"),
        "bystanders": kinds.count("bystander"),
        "copies": kinds.count("copy"),
        "verified": report.count(Verdict.VERIFIED),
        "refuted": report.count(Verdict.REFUTED),
        "inconclusive": report.count(Verdict.INCONCLUSIVE),
        "exact": sum(one.exact for one in report.comparisons),
        "arithmetic": _one_arithmetic(report.comparisons),
        "arithmetics": arithmetic_counts(report.comparisons),
        "survival": _number(report.survival),
        "snr_db": _number(pooled_snr_db(report.comparisons)),
        "bytes_read": report.run.bytes_read,
        "seconds": round(report.run.seconds, 3),
        **speed(report.throughput),
    }


def _one_arithmetic(comparisons: Iterable[Comparison]) -> str | None:
    names = list(arithmetic_counts(comparisons))
    return names[0] if len(names) == 1 else ("mixed" if names else None)


def _family_dict(one: Family) -> dict[str, Any]:
    return {
        "family": one.name,
        "targets": one.targets,
        "verified": one.verified,
        "refuted": one.refuted,
        "inconclusive": one.inconclusive,
        "survival": _number(one.survival),
        "snr_db": _number(one.snr_db),
        "worst": _number(one.worst),
    }


def finding_as_dict(one: Finding) -> dict[str, Any]:
    """A finding as the JSON contract has it."""
    return {
        "code": one.code,
        "name": one.name,
        "severity": one.severity,
        "message": one.message,
        "help": one.help,
        "count": len(one.tensors),
        "tensors": list(one.tensors),
        "evidence": _plain(one.evidence),
    }


def _tensor_dict(one: Comparison) -> dict[str, Any]:
    entry = {
        "name": one.tensor,
        "kind": one.kind,
        "recipe": one.recipe,
        "adapters": list(one.adapters),
        "shape": list(one.shape),
        "dtype": one.dtype,
        "verdict": one.verdict.value,
        "exact": one.exact,
        "arithmetic": one.arithmetic,
        "over_budget": one.over_budget,
        "worst": _number(one.worst),
        "residual": _number(one.residual),
        "survival": _number(one.survival),
        "snr_db": _number(one.snr_db),
        "code": one.code,
    }
    told = {"variant": one.variant, "release": one.release}
    return entry | {key: value for key, value in told.items() if value}


def _number(value: float | None) -> float | None:
    """JSON has no infinity and no NaN: they become null, and the verdict says the rest."""
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a report is to look: every tensor or one screen, colour or none, columns at hand."""

    all: bool = False
    colour: bool = False
    width: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Renderer(Generic[Outcome]):
    """RENDERER: (report or another outcome, style) -> text that ends in a newline."""

    name: str
    render: Callable[[Outcome, Style], str]
