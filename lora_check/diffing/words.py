"""Difference -> text: what changed first, one screen, or a row for every tensor; the same tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from lora_check.diffing.expectations import SAYS
from lora_check.diffing.nouns import Answer, Conversion, Difference, Entry, Group, Shown, Sizes, Status, Value
from lora_check.renderers import _words as words
from lora_check.report import Style
from lora_check.types import Verdict

FAMILIES_SHOWN = 12
TENSORS_SHOWN = 8
NAMES_SHOWN = 3
COLOURS = {Verdict.VERIFIED: "32", Verdict.REFUTED: "31", Verdict.INCONCLUSIVE: "33"}

SIZES = "sizes are of the tensors that are not the same; relative: |B - A| / |A|"

ORDERED: tuple[Conversion, ...] = ("", "unknown", "rounded-back", "rounded", "equal")
SAID = {
    Verdict.VERIFIED: "as expected: ",
    Verdict.REFUTED: "not as expected: ",
    Verdict.INCONCLUSIVE: "not decided: ",
}

LISTED: tuple[Status, ...] = ("reshaped", "retyped", "only in A", "only in B", "unread", "skipped")
"""What is listed by name below the changed."""

Row = Mapping[str, str]


def text(found: Difference, style: Style) -> str:
    """As a person reads it on a terminal."""
    return _Page(found, style, markdown=False).whole()


def markdown(found: Difference, style: Style) -> str:
    """As GitHub shows it in a comment or a job summary."""
    return _Page(found, style, markdown=True).whole()


# -------------------------------------------------------------------------------------------------- the whole


def sentence(found: Difference) -> str:
    """What became of what was expected, or what differs."""
    outcome = SAID[found.verdict] if found.verdict else ""
    met = sum(one.verdict is Verdict.VERIFIED for one in found.answers)
    of = f"{met} of {words.many(len(found.answers), 'expectation')} met; " if found.answers else ""
    return f"{outcome}{of}{_differs(found)}"


def _differs(found: Difference) -> str:
    """`210 of 272 tensors changed, 62 are the same, bit by bit`."""
    total, counts = found.total.tensors, found.total.counts
    kept = counts.get("unchanged", 0)
    apart = "A and B have no tensor in common; " if found.strangers else ""
    if kept == total and total:
        return f"all {words.many(total, 'tensor')} are the same, bit by bit"
    told = [f"{counts[status]} {status}" for status in ("changed", *LISTED) if status in counts]
    also = found.total.moved - counts.get("changed", 0)
    with_others = [f"{also} of the retyped hold other numbers"] if also else []
    odd = sum(one.sizes is not None and one.sizes.odd is not None for one in found.entries)
    broken = [f"{odd} with NaN or infinity in one where the other has a number"] if odd else []
    listed = [*told, *with_others, *broken, f"{kept} the same, bit by bit"]
    return f"{apart}of {words.many(total, 'tensor')} {', '.join(listed)}"


def complaint(one: Answer) -> str:
    """Why an expectation is not met, or not decided."""
    if not one.matched:
        return f"'{one.glob}' was expected {one.kind}, and neither A nor B has a tensor of such a name"
    if one.verdict is Verdict.REFUTED:
        return f"{len(one.against)} of {words.many(one.matched, 'tensor')} of '{one.glob}': expected {one.kind}"
    return f"{len(one.open)} of {words.many(one.matched, 'tensor')} of '{one.glob}': expected {one.kind}, not decided"


def hint(one: Answer) -> str:
    """What to do about it."""
    if not one.matched:
        return "compare the pattern with the names that --all lists; upper and lower case are two things"
    if one.verdict is Verdict.REFUTED:
        return "see these tensors with --show NAME"
    return "let them be looked at, and readable"


@dataclass(frozen=True, slots=True)
class _Page:
    found: Difference
    style: Style
    markdown: bool

    def whole(self) -> str:
        """All sections, from what became of it to what it cost."""
        answers = [one for one in self.found.answers if one.verdict is not Verdict.VERIFIED]
        sections = [
            self._heading(sentence(self.found)),
            self._inputs(),
            *map(self._answer, answers),
            self._families(),
            self._tensors() if self.style.all else self._changed(),
            "" if self.style.all else self._lists(),
            *map(self._shown, self.found.shown),
            self._more(),
            self._prose(_cost(self.found)),
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _heading(self, line: str) -> str:
        if self.markdown:
            return f"### {self._prose(line)}"
        colour = COLOURS[self.found.verdict] if self.found.verdict and self.style.colour else ""
        return f"\x1b[{colour}m{words.plain(line)}\x1b[0m" if colour else words.plain(line)

    def _inputs(self) -> str:
        sides = (("A", self.found.a), ("B", self.found.b))
        if self.markdown:
            return self._table(
                [{"input": name, "location": self._name(one["location"]), "holds": _holds(one)} for name, one in sides]
            )
        return "\n".join(f"{name}  {words.plain(one['location'])}\n   {_holds(one)}" for name, one in sides)

    def _answer(self, one: Answer) -> str:
        severity = "error" if one.verdict is Verdict.REFUTED else "warning"
        names = {**one.against, **one.open}
        shown = list(names) if self.style.all else list(names)[:NAMES_SHOWN]
        lines = [f"{self._name(name)}: {self._prose(names[name])}" for name in shown]
        rest = [f"and {len(names) - len(shown)} more"] if len(names) > len(shown) else []
        return self._list(
            self._prose(f"{severity}: {complaint(one)}"), [*lines, *rest, f"help: {self._prose(hint(one))}"]
        )

    def _families(self) -> str:
        groups = self.found.families
        shown = groups if self.style.all else groups[:FAMILIES_SHOWN]
        rest = groups[len(shown) :]
        same = all(one.counts.get("unchanged", 0) == one.tensors for one in rest)
        of = "nothing differs in them" if same else "--all lists them"
        told = f"and {words.many(len(rest), 'family')} more: {of}" if rest else ""
        rows = [self._family(one) for one in shown] + ([self._family(self.found.total)] if len(groups) > 1 else [])
        measured = SIZES if any("differ" in row for row in rows) else ""
        table = self._table(rows) if rows else "there is no tensor in either"
        return self._below(table, told, self._prose(measured))

    def _family(self, one: Group) -> Row:
        kept = one.counts.get("unchanged", 0)
        return {
            "family": self._name(one.name),
            "tensors": str(one.tensors),
            "changed": str(one.moved),
            "other": str(one.tensors - one.moved - kept or ""),
            "same": str(kept),
            **(_numbers(one.sizes, share=True) if one.sizes.elements else {}),
            "": "; ".join(_not_finite(one.sizes)),
        }

    def _changed(self) -> str:
        """The tensors that changed, those that changed most before the others."""
        changed = [one for one in self.found.entries if _in_table(one)]
        ordered = sorted(changed, key=lambda one: -_weight(one))
        rows = [self._row(one) for one in ordered[:TENSORS_SHOWN]]
        rest = len(ordered) - len(rows)
        told = f"and {rest} more changed (--all lists them)" if rest else ""
        return self._below(self._table(rows) if rows else "", told)

    def _tensors(self) -> str:
        return self._table([{"status": one.status, **self._row(one)} for one in self.found.entries])

    def _row(self, one: Entry) -> Row:
        return {
            "tensor": self._name(one.name),
            "shape": _shapes(one),
            **(_numbers(one.sizes) if one.sizes else {}),
            "at": _place(one.sizes) if one.sizes else "",
            "": self._prose("; ".join(_notes(one))),
        }

    def _lists(self) -> str:
        """What is neither changed nor the same, a line for each with what there is to say; and ties."""
        entries = [one for one in self.found.entries if not _in_table(one)]
        groups = {(status, said): list[Entry]() for status in LISTED for said in ORDERED}
        for one in entries:
            if one.status in LISTED:
                groups[one.status, one.conversion].append(one)
        titles = {key: _title(*key) for key in groups}
        noted = [one for one in entries if one.status == "unchanged" and _notes(one)]
        blocks = [self._named(f"{titles[key]}: {len(members)}", members) for key, members in groups.items() if members]
        return self._below(*blocks, self._named(f"the same, and to be told: {len(noted)}", noted) if noted else "")

    def _named(self, title: str, members: Sequence[Entry]) -> str:
        shown = members[:NAMES_SHOWN]
        lines = [
            "  ".join(filter(None, [self._name(one.name), _shapes(one), self._prose(_aside(one))])) for one in shown
        ]
        rest = [f"and {len(members) - len(shown)} more (--all lists them)"] if len(members) > len(shown) else []
        return self._list(title, [*lines, *rest])

    def _shown(self, one: Shown) -> str:
        title = f"{self._name(one.name)}{one.index}"
        if one.reason:
            return f"{title}: {self._prose(one.reason)}"
        rows = [_value(value, one.digits) for value in one.values]
        more = f"and {one.more} more: narrow the index" if one.more else ""
        table = self._table(rows) if rows else "there is no element"
        return self._below(title, table, more)

    def _more(self) -> str:
        return (
            f"--show means {words.many(self.found.more, 'tensor')} more (--all shows them)" if self.found.more else ""
        )

    # ------------------------------------------------------------------------------------------ text or Markdown

    def _name(self, name: Any) -> str:
        plain = words.plain(name)
        if not self.markdown:
            return plain
        return words.escaped(plain) if "`" in plain or "|" in plain else f"`{plain}`"

    def _prose(self, line: str) -> str:
        return words.escaped(line) if self.markdown else words.plain(line)

    def _below(self, *blocks: str) -> str:
        """Blocks that belong together; Markdown would make one of what no empty line parts."""
        return ("\n\n" if self.markdown else "\n").join(filter(None, blocks))

    def _list(self, title: str, lines: Iterable[str]) -> str:
        if self.markdown:
            return "\n".join([title, "", *(f"- {line}" for line in lines)])
        return "\n".join([title, *(f"  {line}" for line in lines)])

    def _table(self, rows: Sequence[Row]) -> str:
        columns = sorted(dict.fromkeys(key for row in rows for key in row), key=lambda key: key in LAST)
        kept = [key for key in columns if any(row.get(key) for row in rows)]
        return tabulate(
            [[row.get(key, words.NOTHING) for key in kept] for row in rows],
            headers=kept,
            tablefmt="pipe" if self.markdown else "simple",
            colalign=["left" if key in LEFT else "right" for key in kept],
            disable_numparse=True,
        )


LAST = ("at", "")
LEFT = ("input", "location", "holds", "family", "status", "tensor", "shape", "element", "at", "")


# -------------------------------------------------------------------------------------------------- one tensor


def _holds(one: Mapping[str, Any]) -> str:
    return "  ".join(words.described(one))


def _cost(found: Difference) -> str:
    one = found.throughput
    if one is None or not one.size:
        return f"{found.seconds:.2f} s"
    return (
        f"{words.size(one.size)} in {one.seconds:.2f} s, {one.cpu_seconds:.2f} s of CPU, {found.seconds:.2f} s in all"
    )


def _weight(one: Entry) -> float:
    """What a change is put in order by: its size beside the tensor's; one that cannot be told comes first."""
    relative = one.sizes.relative if one.sizes and one.sizes.odd is None else None
    return math.inf if relative is None or not math.isfinite(relative) else relative


def _in_table(one: Entry) -> bool:
    """Whether a tensor has its line among those that changed."""
    return one.moved and one.status != "reshaped"


def _title(status: Status, conversion: Conversion) -> str:
    """`retyped, and its numbers are equal`."""
    return f"{status}, {SAYS[conversion]}" if conversion in SAYS else status


def _numbers(one: Sizes, *, share: bool = False) -> Row:
    """The columns of what was measured; `share` beside the count."""
    if not one.counted:
        return {"differ": str(one.differing or words.NOTHING)}
    return {
        "differ": str(one.differing),
        **({"% of them": words.percent(one.differing / one.elements)} if share else {}),
        "largest": words.number(one.largest),
        "relative": words.number(one.relative),
        "cosine": words.NOTHING if one.cosine is None else f"{one.cosine:.6f}",
    }


def _shapes(one: Entry) -> str:
    """`(576, 576) bfloat16`, or what it was and what it is."""
    sides = [f"{tuple(meta.shape)} {meta.stored_as}" for meta in (one.a, one.b) if meta is not None]
    return " -> ".join(dict.fromkeys(sides))


def _place(one: Sizes) -> str:
    """The index of the first NaN or infinity that the other has not, else of the largest change."""
    place = one.odd if one.odd is not None else one.place
    return f"[{', '.join(map(str, place))}]" if place is not None else ""


def _notes(one: Entry) -> list[str]:
    """What the numbers do not tell."""
    pair = "paired with" if one.a and one.b else "in full"
    notes = [_tie(one)] if one.tied else [f"{pair} {one.other}"] if one.other else []
    if one.rows is not None:
        notes.append(f"the first {one.rows} rows were compared: {_common(one)}")
    if one.status == "retyped":
        notes.append("its numbers differ" if one.conversion == "differs" else SAYS.get(one.conversion, ""))
    if one.sizes is not None:
        notes += _oddities(one, one.sizes)
    return [note for note in [*notes, one.reason] if note]


def _aside(one: Entry) -> str:
    """The same without what the title of a list says."""
    return "; ".join(note for note in _notes(one) if note != SAYS.get(one.conversion))


def _tie(one: Entry) -> str:
    return f"tied in {one.tied}, so it was compared with {one.other}"


def _common(one: Entry) -> str:
    count = one.sizes.differing if one.sizes else 0
    return f"{words.many(count, 'element')} differ{'s' if count == 1 else ''}" if count else "the same"


def _oddities(one: Entry, sizes: Sizes) -> list[str]:
    """Elements that no norm can hold, and bits that are no numbers."""
    odd = [f"{words.many(sizes.in_bits, 'element')} in bits only"] if sizes.in_bits else []
    odd += _not_finite(sizes)
    odd += ["its bits were compared, not its numbers"] if not sizes.counted and one.status == "changed" else []
    lost = sizes.counted and (sizes.norm is None or not math.isfinite(sizes.square_a + sizes.square_b))
    return odd + (["sums of squares are beyond float64"] if lost else [])


def _not_finite(sizes: Sizes) -> list[str]:
    """How many elements are NaN and how many are infinite, in each of the two."""
    sides = {"A": sizes.a, "B": sizes.b}
    return [
        *(f"{side.nan} NaN in {name}" for name, side in sides.items() if side.nan),
        *(f"{side.infinite} infinite in {name}" for name, side in sides.items() if side.infinite),
    ]


def _value(one: Value, digits: tuple[int, int]) -> Row:
    apart = "" if one.a is None or one.b is None else _digits(one.b - one.a, 6)
    return {
        "element": f"[{', '.join(map(str, one.place))}]",
        "A": _digits(one.a, digits[0]),
        "B": _digits(one.b, digits[1]),
        "B - A": apart,
    }


def _digits(value: complex | None, digits: int) -> str:
    if value is None:
        return words.NOTHING
    return str(value) if isinstance(value, (int, complex)) and not isinstance(value, float) else f"{value:.{digits}g}"
