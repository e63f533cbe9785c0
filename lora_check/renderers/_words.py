"""What every renderer must say the same way: the verdict in one sentence, where a finding lies, and numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_check.extent import by_kind
from lora_check.reading.throughput import Throughput
from lora_check.report import Report
from lora_check.types import Comparison, Finding, Verdict

SEVERITIES = ("error", "warning", "info")
NOTHING = "-"


def plain(text: Any) -> str:
    """The text on one line, with every character that could move a cursor written as its escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def escaped(text: Any) -> str:
    """Prose that Markdown shows as it is written."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", plain(text))


def number(value: float | None) -> str:
    """Three significant digits; a dash where there is nothing to tell."""
    return NOTHING if value is None else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in percent, without the sign."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def decibels(value: float | None) -> str:
    """One decimal."""
    return NOTHING if value is None else f"{value:.1f}"


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    unit = min(int(math.log10(count) // 3), 5) if count >= 1 else 0
    value = count / 1000**unit
    digits = 0 if unit == 0 or value >= 100 else 1
    return f"{value:.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[unit]}"


def many(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`, `2 families`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def shape(one: Comparison) -> str:
    """(4096, 4096) bfloat16."""
    return f"({', '.join(map(str, one.shape))}) {one.dtype}"


def pairs(mapping: Mapping[str, Any], without: Iterable[str] = ()) -> list[str]:
    """`name value` for every entry that holds something."""
    skip = set(without)
    told = {key: value for key, value in mapping.items() if key not in skip and value not in (None, "", (), [], {})}
    return [f"{plain(key).replace('_', ' ')} {_value(value)}" for key, value in told.items()]


def described(one: Mapping[str, Any]) -> list[str]:
    """What is told of an input beside its location; what is as usual is not told."""
    usual = {"location", *(key for key, value in one.items() if value is False or (key, value) == ("weight", 1.0))}
    told = {key: value if key != "bytes" else size(value) for key, value in one.items()}
    return pairs(told, without=usual)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return _few([f"{plain(key)} {_value(item)}" for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return _few([_value(item) for item in value])
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def _few(items: Sequence[str], most: int = 8) -> str:
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return ", ".join([*items[:most], *rest])


# -------------------------------------------------------------------------------------------------- the whole


def sentence(report: Report) -> str:
    """The verdict and what it rests on."""
    return f"{report.verdict.value}: {_ground(report)}"


def _ground(report: Report) -> str:
    total = many(len(report.comparisons), "tensor")
    if report.verdict is Verdict.VERIFIED:
        return f"{total} compared, and all hold what an honest merge writes"
    bad = report.count(report.verdict)
    if report.verdict is Verdict.REFUTED:
        return f"{bad} of {total} cannot come from an honest merge" if bad else _decided_by(report)
    return f"nothing is refuted, but {f'{bad} of {total} could not be decided' if bad else _decided_by(report)}"


def _decided_by(report: Report) -> str:
    first = next(iter(by_severity(report.findings)), None)
    return plain(first.message) if first else "a finding that is withheld here decides"


def totals(report: Report) -> str:
    """`refuted: 291 tensors, 67 verified, 224 refuted, 0 inconclusive, 1 finding`."""
    counts = [f"{report.count(verdict)} {verdict.value}" for verdict in _SPOKEN]
    parts = [many(len(report.comparisons), "tensor"), *counts, many(len(report.findings), "finding")]
    return f"{report.verdict.value}: {', '.join(parts)}"


_SPOKEN = (Verdict.VERIFIED, Verdict.REFUTED, Verdict.INCONCLUSIVE)


def cost(report: Report) -> str:
    """`2.1 GB in 1.4 s (1.5 GB/s of 5.8, bound by compute)`; without a rate where there was no pass to be timed."""
    if report.throughput and report.throughput.size:
        return _timed(report.throughput, report.run.seconds)
    return f"{size(report.run.bytes_read)} in {report.run.seconds:.2f} s"


def _timed(one: Throughput, whole: float) -> str:
    """The pass, what could have been, and the time of everything where that is longer."""
    ceiling = f" of {one.ceiling / 1e9:.2g}" if one.ceiling else ""
    bound = f", bound by {one.bound}" if one.bound else ""
    rest = f", {whole:.2f} s in all" if round(whole, 1) > round(one.seconds, 1) else ""
    return f"{size(one.size)} in {one.seconds:.2f} s ({one.rate / 1e9:.2g} GB/s{ceiling}{bound}){rest}"


def withheld(report: Report) -> str:
    """What --select and --ignore keep from the list; nothing where they keep nothing."""
    if not report.withheld:
        return ""
    return f"{many(report.withheld, 'finding')} withheld by --select or --ignore; the verdict counts them"


def untouched(report: Report) -> str:
    """`bystanders 146 of 146 verified, copies 2 of 2 verified`."""
    found = [
        f"{plural} {_verified(members)} of {len(members)} verified"
        for plural, members in (("bystanders", of_kind(report, "bystander")), ("copies", of_kind(report, "copy")))
        if members
    ]
    return ", ".join(found) or "no bystanders, no copies"


def of_kind(report: Report, kind: str) -> list[Comparison]:
    """The comparisons of one kind of tensor."""
    return [one for one in report.comparisons if one.kind == kind]


def _verified(members: Iterable[Comparison]) -> int:
    return sum(one.verdict is Verdict.VERIFIED for one in members)


def variants(report: Report) -> list[tuple[str, list[Comparison]]]:
    """The comparisons of each producer; one nameless group where there was one merged checkpoint."""
    names = dict.fromkeys(one.variant for one in report.comparisons)
    return [(name, [one for one in report.comparisons if one.variant == name]) for name in names]


# ------------------------------------------------------------------------------------------------ one finding


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, else in the order given."""
    return sorted(findings, key=lambda one: SEVERITIES.index(one.severity))


def measured(report: Report, finding: Finding) -> dict[str, Comparison]:
    """The comparison behind each tensor of a finding, where there is one; among several, the one it explains."""
    wanted, found = set(finding.tensors), {}
    for one in sorted(report.comparisons, key=lambda one: one.code == finding.code):
        if one.tensor in wanted:
            found[one.tensor] = one
    return found


MEASURED = ("worst_tensor", "over_budget", "elements", "times_budget")
"""Evidence that the line of the worst tensor tells, which is shown first."""


def evidence(finding: Finding) -> list[str]:
    """`name value` of what the tensors listed beside it do not tell."""
    return pairs(finding.evidence, without=MEASURED if "worst_tensor" in finding.evidence else ())


def worst_first(finding: Finding) -> list[str]:
    """The tensors of a finding, the worst of them before the others."""
    return sorted(finding.tensors, key=lambda name: name != finding.evidence.get("worst_tensor"))


def whereabouts(report: Report, finding: Finding) -> str:
    """`12 of 28 targets; q_proj 6, v_proj 6; layers 0-5`; without what the message tells."""
    known = measured(report, finding)
    if _told(report, finding, known):
        return ""
    said = re.search(rf"\b{len(finding.tensors)}\b", finding.message)
    count = "" if said else _how_many(report, finding, known)
    return "; ".join(filter(None, [count, _families(finding, known), _layers(finding)]))


def _told(report: Report, finding: Finding, known: Mapping[str, Comparison]) -> bool:
    """Whether the message says in words where the finding lies."""
    members = [known[name] for name in finding.tensors if name in known]
    where = by_kind(members, report.comparisons)
    return bool(where) and where in finding.message and not where.startswith(str(len(members)))


def _how_many(report: Report, finding: Finding, known: Mapping[str, Comparison]) -> str:
    kinds = {one.kind for one in known.values()}
    count = len(finding.tensors)
    if len(kinds) != 1 or len(known) != count:
        return many(count, "tensor")
    kind = kinds.pop()
    whole = len({one.tensor for one in of_kind(report, kind)})
    return f"{count} of {many(whole, kind)}"


def _families(finding: Finding, known: Mapping[str, Comparison]) -> str:
    names = [known[name].family if name in known else _parent(name) for name in finding.tensors]
    return _few([f"{plain(name)} {count}" for name, count in Counter(names).most_common()])


def _parent(tensor: str) -> str:
    return tensor.split(".")[-2] if "." in tensor else tensor


def _layers(finding: Finding) -> str:
    found = (re.search(r"(?:^|\.)(\d{1,9})\.", name) for name in finding.tensors)
    numbers = sorted({int(match.group(1)) for match in found if match})
    runs = _runs(numbers)
    if len(runs) > 5:
        return f"{many(len(numbers), 'layer')} between {numbers[0]} and {numbers[-1]}"
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(runs)}" if runs else ""


def _runs(numbers: Sequence[int]) -> list[str]:
    """0 1 2 5 -> 0-2, 5."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return [f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True)]
