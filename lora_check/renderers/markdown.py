"""The report as GitHub shows it in a comment, a job summary or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.renderers import _words as words
from lora_check.report import Family, Renderer, Report, Style, arithmetic_counts
from lora_check.types import Comparison, Finding

TENSORS_SHOWN = 10


def render(report: Report, style: Style) -> str:
    """Tables and lists; with `style.all` every tensor of every finding, and a row per tensor."""
    sections = [
        f"### {words.escaped(words.sentence(report))}",
        _inputs(report),
        *(_variant(report, name, members) for name, members in words.variants(report)),
        *(_finding(report, one, style) for one in words.by_severity(report.findings)),
        _tensors(report.comparisons) if style.all else "",
        words.escaped(words.withheld(report)),
        words.escaped(f"{words.totals(report)}, {words.cost(report)}"),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _inputs(report: Report) -> str:
    run = report.run
    inputs = [("base", run.base), *(("adapter", one) for one in run.adapters), ("merged", run.merged)]
    return _table([_input(role, one) for role, one in inputs])


def _input(role: str, one: Mapping[str, Any]) -> dict[str, str]:
    told = ", ".join(words.described(one))
    return {"input": role, "location": _code(one.get("location", "")), "holds": words.escaped(told)}


def _variant(report: Report, name: str, members: Sequence[Comparison]) -> str:
    part = replace(report, comparisons=tuple(members))
    told = [f"{key} in {count}" for key, count in arithmetic_counts(members).items()]
    lines = [words.untouched(part), *([f"arithmetic {', '.join(told)}"] if told else [])]
    heading = f"**{words.escaped(name)} merge**\n\n" if name else ""
    table = _table([_family(one) for one in part.families])
    return heading + "\n\n".join(filter(None, [table, words.escaped("; ".join(lines))]))


def _family(one: Family) -> dict[str, str]:
    return {
        "family": _code(one.name),
        "targets": str(one.targets),
        "verified": str(one.verified),
        "refuted": str(one.refuted),
        "inconclusive": str(one.inconclusive),
        "survival %": words.percent(one.survival),
        "delta SNR dB": words.decibels(one.snr_db),
        "x budget": words.number(one.worst),
    }


def _finding(report: Report, one: Finding, style: Style) -> str:
    ordered = words.worst_first(one)
    shown = ordered if style.all else ordered[:TENSORS_SHOWN]
    rest = len(one.tensors) - len(shown)
    where = words.escaped(words.whereabouts(report, one)) if one.tensors else ""
    lines = [*([where] if where else []), *(_code(name) for name in shown), *([f"and {rest} more"] if rest else [])]
    evidence = [words.escaped(", ".join(told))] if (told := words.evidence(one)) else []
    advice = [f"help: {words.escaped(one.help)}"] if one.help else []
    title = f"**{one.severity}\\[{one.code}\\] {words.escaped(one.name)}**: {words.escaped(one.message)}"
    return "\n".join([title, "", *(f"- {line}" for line in [*lines, *evidence, *advice])]).rstrip()


def _tensors(comparisons: Iterable[Comparison]) -> str:
    return _table([_tensor(one) for one in comparisons])


def _tensor(one: Comparison) -> dict[str, str]:
    return {
        "tensor": _code(one.tensor),
        **({"merge": one.variant} if one.variant else {}),
        "kind": one.kind,
        "recipe": one.recipe,
        "shape": words.shape(one),
        "verdict": one.verdict.value,
        "arithmetic": one.arithmetic or words.NOTHING,
        "over budget": str(one.over_budget),
        "worst": words.number(one.worst),
        "residual": words.number(one.residual),
        "survival %": words.percent(one.survival),
        "code": one.code or words.NOTHING,
    }


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: Any) -> str:
    """A code span whose fence is longer than any run of backticks inside; prose where a pipe would end the cell."""
    inner = words.plain(text)
    if "|" in inner:
        return words.escaped(inner)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", inner)), default=0))
    pad = " " if inner.startswith("`") or inner.endswith("`") else ""
    return f"{fence}{pad}{inner}{pad}{fence}" if inner else ""


RENDERER = Renderer(name="markdown", render=render)
