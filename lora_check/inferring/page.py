"""Inference -> text: what MERGED is, a row for each family that changed, or for every tensor; the same as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tabulate import tabulate

from lora_check.inferring.extracting import Extracted
from lora_check.inferring.outcome import Change, Inference, Kind
from lora_check.inferring.words import remarks, says
from lora_check.renderers import _words as words
from lora_check.report import Style

UNTOLD_SHOWN = 3
SHARES_SHOWN = 4
LEFT = ("input", "location", "holds", "family", "tensor", "change")

Row = Mapping[str, str]


def text(found: Inference, extracted: Extracted | None, style: Style) -> str:
    """As a person reads it on a terminal."""
    return _Page(found, extracted, style, markdown=False).whole()


def markdown(found: Inference, extracted: Extracted | None, style: Style) -> str:
    """As GitHub shows it in a comment or a job summary."""
    return _Page(found, extracted, style, markdown=True).whole()


@dataclass(frozen=True, slots=True)
class _Page:
    found: Inference
    extracted: Extracted | None
    style: Style
    markdown: bool

    def whole(self) -> str:
        changed = [one for one in self.found.changes if one.kind is not Kind.COPY]
        families = self.found.families.items()
        rows = [self._family(name, members) for name, members in families if any(one in changed for one in members)]
        told = [self._prose(line) for line in (self.extracted.lines if self.extracted else ())]
        sections = [
            self._heading(),
            self._inputs(),
            self._table(rows),
            self._table([self._line(one) for one in changed]) if self.style.all else "",
            *(self._prose(f"note: {one}") for one in remarks(self.found)),
            *(f"{self._name(one.tensor)}: {self._prose(one.because)}" for one in self._untold()),
            *told,
            self._prose(self._counted(len(changed))),
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _heading(self) -> str:
        line = self._prose(says(self.found))
        return f"### {line}" if self.markdown else line

    def _inputs(self) -> str:
        sides = (("base", self.found.base), ("merged", self.found.merged))
        if self.markdown:
            return self._table(
                [{"input": role, "location": self._name(one["location"]), "holds": _holds(one)} for role, one in sides]
            )
        return "\n".join(f"{role:8}{words.plain(one['location'])}\n        {_holds(one)}" for role, one in sides)

    def _untold(self) -> Sequence[Change]:
        return self.found.untold if self.style.all else self.found.untold[:UNTOLD_SHOWN]

    def _counted(self, changed: int) -> str:
        total = len(self.found.changes)
        return f"{total} matrices and vectors, {total - changed} unchanged, {self.found.seconds:.1f} s"

    def _family(self, name: str, members: Sequence[Change]) -> Row:
        """How many changed, of which kind and rank, and how far above the noise."""
        kinds = Counter(one.kind.value for one in members if one.kind is not Kind.COPY)
        low = [one for one in members if one.kind is Kind.LOW_RANK]
        ranks = Counter(one.rank for one in low)
        told = [one.margin for one in low if one.margin is not None]
        signals = [one.snr_db for one in low if one.snr_db is not None]
        return {
            "family": self._name(name),
            "change": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
            "unchanged": str(len(members) - sum(kinds.values())),
            "rank": ", ".join(
                f"{rank} ({count})" if len(ranks) > 1 else f"{rank}" for rank, count in ranks.most_common()
            ),
            "certain": str(sum(one.confidence == "certain" for one in low)) if low else "",
            "x floor": f"{min(told):.3g}" if told else "",
            "SNR dB": f"{median(signals):.1f}" if signals else "",
            "energy per rank %": _shares(low),
        }

    def _line(self, one: Change) -> Row:
        return {
            "tensor": self._name(one.tensor),
            "change": one.kind.value,
            "rank": str(one.rank or ""),
            "hidden": str(one.hidden or ""),
            "confidence": one.confidence,
            "x floor": f"{one.margin:.3g}" if one.margin is not None else "",
            "gap": f"{one.gap:.3g}" if one.gap is not None else "",
            "SNR dB": f"{one.snr_db:.1f}" if one.snr_db is not None else "",
        }

    # ------------------------------------------------------------------------------------------ text or Markdown

    def _name(self, name: Any) -> str:
        plain = words.plain(name)
        if not self.markdown:
            return plain
        return words.escaped(plain) if "`" in plain or "|" in plain else f"`{plain}`"

    def _prose(self, line: str) -> str:
        return words.escaped(line) if self.markdown else words.plain(line)

    def _table(self, rows: Sequence[Row]) -> str:
        columns = dict.fromkeys(key for row in rows for key in row if any(one.get(key) for one in rows))
        return tabulate(
            [[row.get(key, "") for key in columns] for row in rows],
            headers=list(columns),
            tablefmt="pipe" if self.markdown else "simple",
            colalign=["left" if key in LEFT else "right" for key in columns],
            disable_numparse=True,
        )


def _holds(one: Mapping[str, Any]) -> str:
    return f"tensors {one['tensors']}  dtypes {', '.join(one['dtypes'])}"


def _shares(low: Sequence[Change]) -> str:
    """Of the family's median matrix, the first few."""
    columns = [[one.shares[place] for one in low if place < len(one.shares)] for place in range(SHARES_SHOWN)]
    return " ".join(f"{100 * median(column):.3g}" for column in columns if column)
