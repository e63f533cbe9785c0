"""One screen for a healthy or a broken merge: the verdict, the inputs, the families, one block per kind of mistake."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate

from lora_check.renderers import _words as words
from lora_check.report import Family, Renderer, Report, Style, arithmetic_counts
from lora_check.types import Comparison, Finding

TENSORS_SHOWN = 3
FAMILIES_SHOWN = 12
FINDINGS_SHOWN = 4
COLOURS = {
    "verified": "32",
    "refuted": "31",
    "inconclusive": "33",
    "error": "31",
    "warning": "33",
    "info": "36",
}


def render(report: Report, style: Style) -> str:
    """The report as a person reads it on a terminal."""
    page = _Page(report, style)
    sections = [page.verdict(), page.inputs(), page.families(), page.tensors(), *page.findings(), page.end()]
    return "\n\n".join(section for section in sections if section) + "\n"


@dataclass(frozen=True, slots=True)
class _Page:
    report: Report
    style: Style

    def verdict(self) -> str:
        return self._painted(words.sentence(self.report), self.report.verdict.value)

    def inputs(self) -> str:
        run = self.report.run
        inputs = [("base", run.base), *(("adapter", one) for one in run.adapters), ("merged", run.merged)]
        return "\n".join(line for role, one in inputs for line in self._input(role, one))

    def _input(self, role: str, one: Mapping[str, Any]) -> list[str]:
        location = words.plain(one.get("location", ""))
        return [f"{role:<8} {location}", *(f"{'':<8} {line}" for line in self._wrapped(words.described(one), 9))]

    def families(self) -> str:
        parts = [self._variant(name, members) for name, members in words.variants(self.report)]
        return "\n\n".join(parts) or "no tensor was compared"

    def _variant(self, name: str, members: Sequence[Comparison]) -> str:
        report = replace(self.report, comparisons=tuple(members))
        heading = [f"{name} merge"] if name else []
        rest = [words.untouched(report), *_arithmetic(members)]
        return "\n".join([*heading, *self._family_table(report), *rest])

    def _family_table(self, report: Report) -> list[str]:
        families = report.families
        shown = families if self.style.all else _worst_first(families)[:FAMILIES_SHOWN]
        if not families:
            return ["no targets"]
        table = _table([_family(one) for one in shown])
        return [table, *_rest(families, shown), ""]

    def tensors(self) -> str:
        rows = [_tensor(one) for one in self.report.comparisons] if self.style.all else []
        return _table(rows) if rows else ""

    def findings(self) -> list[str]:
        ordered = words.by_severity(self.report.findings)
        shown = ordered if self.style.all else ordered[:FINDINGS_SHOWN]
        blocks = [self._block(one) for one in shown]
        return [*blocks, *self._unshown(ordered[len(shown) :])]

    def _unshown(self, rest: Sequence[Finding]) -> list[str]:
        codes = ", ".join(dict.fromkeys(one.code for one in rest))
        return [f"and {words.many(len(rest), 'finding')} more: {codes} (--all lists them)"] if rest else []

    def _block(self, one: Finding) -> str:
        head = self._painted(f"{one.severity}[{one.code}]", one.severity)
        title = f"{head} {one.name}: {words.plain(one.message)}"
        details = [*self._places(one), *self._wrapped(words.evidence(one))]
        advice = self._wrapped(["help:", *words.plain(one.help).split()], gap=" ") if one.help else []
        return "\n".join([title, *(f"  {line}" for line in [*details, *advice, f"explain {one.code}"])])

    def _places(self, one: Finding) -> list[str]:
        if not one.tensors:
            return []
        known = words.measured(self.report, one)
        ordered = words.worst_first(one)
        shown = ordered if self.style.all else ordered[:TENSORS_SHOWN]
        lines = [_place(name, known.get(name)) for name in shown]
        rest = len(one.tensors) - len(shown)
        return [
            *self._wrapped(words.whereabouts(self.report, one).split(), gap=" "),
            *lines,
            *([f"and {rest} more"] if rest else []),
        ]

    def end(self) -> str:
        last = f"{words.totals(self.report)}, {words.cost(self.report)}"
        return "\n".join(filter(None, [words.withheld(self.report), self._painted(last, self.report.verdict.value)]))

    def _wrapped(self, parts: Iterable[str], indent: int = 2, gap: str = "  ") -> list[str]:
        """The parts on as few lines as hold them, none of them torn."""
        lines: list[str] = []
        for part in parts:
            if lines and len(lines[-1]) + len(gap) + len(part) <= self.style.width - indent:
                lines[-1] += gap + part
            else:
                lines.append(part)
        return lines

    def _painted(self, text: str, meaning: str) -> str:
        return f"\x1b[{COLOURS[meaning]}m{text}\x1b[0m" if self.style.colour else text


def _arithmetic(members: Sequence[Comparison]) -> list[str]:
    counts = arithmetic_counts(members)
    total = sum(one.kind == "target" for one in members)
    told = [f"{name} in {count} of {words.many(total, 'target')}" for name, count in counts.items()]
    return [f"arithmetic {', '.join(told)}"] if told else []


def _worst_first(families: Sequence[Family]) -> list[Family]:
    """The given order where all fit on a screen; else those with something refuted or undecided come first."""
    if len(families) <= FAMILIES_SHOWN:
        return list(families)
    return sorted(families, key=lambda one: (-one.refuted, -one.inconclusive))


def _rest(families: Sequence[Family], shown: Sequence[Family]) -> list[str]:
    hidden = [one for one in families if one not in shown]
    if not hidden:
        return []
    sums = [(sum(getattr(one, verdict) for one in hidden), verdict) for verdict in ("refuted", "inconclusive")]
    told = [f"{count} {verdict}" for count, verdict in sums if count] or ["all verified"]
    return [f"and {words.many(len(hidden), 'family')} more: {', '.join(told)} (--all lists them)"]


def _family(one: Family) -> dict[str, str]:
    return {
        "family": words.plain(one.name),
        "targets": str(one.targets),
        "verified": str(one.verified),
        "refuted": str(one.refuted),
        "inconclusive": str(one.inconclusive),
        "survival %": words.percent(one.survival),
        "SNR dB": words.decibels(one.snr_db),
        "x budget": words.number(one.worst),
    }


def _tensor(one: Comparison) -> dict[str, str]:
    return {
        "tensor": words.plain(one.tensor),
        **({"merge": one.variant} if one.variant else {}),
        "kind": one.kind,
        "recipe": one.recipe,
        "shape": words.shape(one),
        "verdict": one.verdict.value,
        "arithmetic": one.arithmetic or words.NOTHING,
        "exact": "yes" if one.exact else "no",
        "over": str(one.over_budget),
        "worst": words.number(one.worst),
        "residual": words.number(one.residual),
        "survival %": words.percent(one.survival),
        "code": one.code or words.NOTHING,
    }


def _place(name: str, one: Comparison | None) -> str:
    if one is None:
        return words.plain(name)
    over = f"{one.over_budget} of {math.prod(one.shape)} over budget" if one.over_budget else ""
    return "  ".join(filter(None, [words.plain(name), words.shape(one), over]))


def _table(rows: Iterable[Mapping[str, str]]) -> str:
    listed = list(rows)
    left = {"family", "tensor", "merge", "kind", "recipe", "shape", "verdict", "arithmetic", "exact", "code"}
    align = ["left" if column in left else "right" for column in listed[0]]
    return tabulate(
        [list(row.values()) for row in listed],
        headers=list(listed[0]),
        tablefmt="simple",
        colalign=align,
        disable_numparse=True,
    )


RENDERER = Renderer(name="text", render=render)
