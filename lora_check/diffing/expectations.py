"""What was expected of names, and what became of it. What was not looked at is never as expected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_check.diffing.nouns import Answer, Entry
from lora_check.diffing.pairs import matches

SAYS = {
    "equal": "its numbers are equal",
    "rounded": "B is A rounded to its dtype",
    "rounded-back": "A is B rounded to its dtype",
}
"""What a change of dtype alone did."""


def answers(entries: Sequence[Entry], changed: Sequence[str], unchanged: Sequence[str]) -> tuple[Answer, ...]:
    """Judge every expectation by what was found.

    changed, unchanged   glob patterns on the names of either checkpoint
    """
    asked = [("changed", glob) for glob in changed] + [("unchanged", glob) for glob in unchanged]
    return tuple(_answer(kind, glob, entries) for kind, glob in asked)


def _answer(kind: str, glob: str, entries: Sequence[Entry]) -> Answer:
    meant = [one for one in entries if matches(one.names, glob)]
    told = {one.name: _told(kind, one) for one in meant}
    undecided = {one.name for one in meant if _open(kind, one)}
    return Answer(
        kind=kind,
        glob=glob,
        matched=len(meant),
        against={name: why for name, why in told.items() if why and name not in undecided},
        open={name: why for name, why in told.items() if name in undecided},
    )


def _open(kind: str, one: Entry) -> bool:
    """Whether it is not known if this is as expected; another dtype is never the same bits, whatever the numbers."""
    return one.undecided and not (kind == "unchanged" and one.status == "retyped")


def _told(kind: str, one: Entry) -> str:
    """Why a tensor is not as expected, or not known to be; "": it is."""
    if one.status == "skipped":
        return "not looked at: --include or --exclude leaves it out"
    if one.status == "unread":
        return one.reason
    fits = one.moved if kind == "changed" else one.status == "unchanged"
    return "" if fits and not one.undecided else ", ".join(_because(one))


def _because(one: Entry) -> Iterator[str]:
    yield one.status
    if one.conversion in SAYS:
        yield SAYS[one.conversion]
    if one.conversion == "unknown" and one.reason:
        yield one.reason
