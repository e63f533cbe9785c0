"""What a comparison of two checkpoints finds: numbers, no prose. Squares are sums over all elements, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_check.reading.throughput import Throughput
from lora_check.types import TensorMeta, Verdict

Status = Literal["changed", "reshaped", "retyped", "only in A", "only in B", "unread", "skipped", "unchanged"]
STATUSES: tuple[Status, ...] = (
    "changed",
    "reshaped",
    "retyped",
    "only in A",
    "only in B",
    "unread",
    "skipped",
    "unchanged",
)
"""In the order in which they are told."""

Conversion = Literal["", "equal", "rounded", "rounded-back", "differs", "unknown"]
"""What a change of dtype did to the numbers. equal: nothing; rounded: B is A rounded to B's dtype; rounded-back: A is B
rounded to A's; unknown: there is no number to be had of one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """How one of the two holds what is not finite: elements that are NaN, and infinities of either sign."""

    nan: int = 0
    infinite: int = 0

    def __add__(self, other: Side) -> Side:
        return Side(nan=self.nan + other.nan, infinite=self.infinite + other.infinite)

    @property
    def count(self) -> int:
        """Elements that are not finite."""
        return self.nan + self.infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How far two tensors are apart, a and b their elements.

    elements   that were compared
    differing  of them: their bits are not the same; of two dtypes, their numbers
    in_bits    of those: their numbers are equal (+0 and -0), or both are NaN
    largest    |b - a| where both are finite, and the largest of all      place   its index; None: there is none
    odd        the index of the first whose numbers differ, one of them NaN or infinite; None: there is none
    change, square_a, square_b   sums of |b - a|^2, |a|^2, |b|^2, where both are finite          dot   of a b
    left_out   elements of which one is not finite: they are in no sum
    counted    False: nobody can compute with this dtype, and only its bits were compared
    to_b, to_a one of the two is the other as its own dtype rounds it
    """

    elements: int = 0
    differing: int = 0
    in_bits: int = 0
    largest: float = 0.0
    place: tuple[int, ...] | None = None
    odd: tuple[int, ...] | None = None
    change: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0
    dot: float = 0.0
    left_out: int = 0
    a: Side = field(default_factory=Side)
    b: Side = field(default_factory=Side)
    counted: bool = True
    to_b: bool = False
    to_a: bool = False

    @property
    def numbers(self) -> int:
        """Elements whose numbers differ."""
        return self.differing - self.in_bits

    @property
    def norm(self) -> float | None:
        """|b - a|; None where float64 cannot hold its square."""
        return _root(self.change, self.largest) if self.counted else None

    @property
    def relative(self) -> float | None:
        """|b - a| / |a|; None where a is zero, or either cannot be told."""
        norm, of = self.norm, _root(self.square_a, self.square_a)
        return norm / of if norm is not None and of else None

    @property
    def cosine(self) -> float | None:
        """<a, b> / (|a| |b|); None where one is zero, or cannot be told."""
        norms = _root(self.square_a, self.square_a), _root(self.square_b, self.square_b)
        if not (self.counted and norms[0] and norms[1] and math.isfinite(self.dot)):
            return None
        return max(-1.0, min(1.0, self.dot / norms[0] / norms[1]))


def _root(square: float, size: float) -> float | None:
    """The root of a sum of squares that neither overflowed nor vanished, though what it is of did not."""
    held = math.isfinite(square) and (square > 0 or size == 0)
    return math.sqrt(square) if held else None


def pooled(many: Iterable[Sizes]) -> Sizes:
    """The sizes of several parts as if they were one; the largest has no place."""
    sizes = [one for one in many if one.counted]
    return Sizes(
        elements=sum(one.elements for one in sizes),
        differing=sum(one.differing for one in sizes),
        in_bits=sum(one.in_bits for one in sizes),
        largest=max((one.largest for one in sizes), default=0.0),
        change=_sum(one.change for one in sizes),
        square_a=_sum(one.square_a for one in sizes),
        square_b=_sum(one.square_b for one in sizes),
        dot=_sum(one.dot for one in sizes),
        left_out=sum(one.left_out for one in sizes),
        a=sum((one.a for one in sizes), Side()),
        b=sum((one.b for one in sizes), Side()),
    )


def _sum(terms: Iterable[float]) -> float:
    """The sum, rounded once; infinity where float64 cannot hold it."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # the latter of infinities of both signs
        return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of A, of B, or of both.

    name         in B; in A, where B has none of its own
    other        what the other checkpoint calls it, where that is another name
    a, b         what the headers say; None: there is none
    sizes        None: it was not compared, or there is nothing to compare it with
    tied         the checkpoint that has it in its embedding only, for its configuration ties the two: "A" or "B"
    reason       why it was not read, or why one of them has none
    rows         of the first dimension, those that were compared; None: all
    """

    name: str
    status: Status
    family: str
    a: TensorMeta | None = None
    b: TensorMeta | None = None
    other: str = ""
    sizes: Sizes | None = None
    conversion: Conversion = ""
    tied: str = ""
    reason: str = ""
    rows: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All that a pattern may mean it by."""
        return tuple(dict.fromkeys(one for one in (self.name, self.other) if one))

    @property
    def undecided(self) -> bool:
        """Whether it is not known what became of it."""
        return self.status in ("unread", "skipped") or self.conversion == "unknown"

    @property
    def moved(self) -> bool:
        """Whether something else than a conversion made B of A."""
        converted = self.status == "retyped" and self.conversion in ("equal", "rounded", "rounded-back")
        return self.status in ("changed", "reshaped", "retyped") and not converted


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The tensors of one family: how many there are, how many have each status, and the sizes of what is not the same.

    moved   how many changed as tensors of one shape, whether their dtype did too or not
    """

    name: str
    tensors: int
    moved: int
    counts: Mapping[Status, int]
    sizes: Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One expectation and what became of it.

    kind     "changed" or "unchanged"           glob   over names
    matched  how many tensors it is about       against, open   tensor -> why it is not met, or not decided
    """

    kind: str
    glob: str
    matched: int
    against: Mapping[str, str]
    open: Mapping[str, str]

    @property
    def verdict(self) -> Verdict:
        """A pattern that matches nothing is not met."""
        if self.against or not self.matched:
            return Verdict.REFUTED
        return Verdict.INCONCLUSIVE if self.open else Verdict.VERIFIED


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One element of both; None: that side has none there."""

    place: tuple[int, ...]
    a: complex | None
    b: complex | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Chosen values of one tensor; `more` of those that were asked for are not among them."""

    name: str
    index: str
    values: tuple[Value, ...]
    more: int = 0
    reason: str = ""
    digits: tuple[int, int] = (9, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The outcome: every tensor of A and of B once.

    a, b       what was given: location, tensors, bytes, dtypes
    more       how many tensors --show means beside those that are shown
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    tool: Mapping[str, str]
    entries: tuple[Entry, ...]
    answers: tuple[Answer, ...] = ()
    shown: tuple[Shown, ...] = ()
    more: int = 0
    seconds: float = 0.0
    throughput: Throughput | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Whether all is as expected; None: nothing was expected, and all was compared.

        What --include and --exclude leave out is open where nothing is expected; else it is where a pattern means it.
        Two checkpoints without a name in common were not compared.
        """
        unread = any(one.undecided and (one.status != "skipped" or not self.answers) for one in self.entries)
        seen = [one.verdict for one in self.answers] + [Verdict.INCONCLUSIVE] * (unread or self.strangers)
        return max(seen, key=lambda one: one.rank, default=None)

    @property
    def strangers(self) -> bool:
        """Whether no tensor of one has a counterpart in the other."""
        return not any(one.a and one.b for one in self.entries)

    @property
    def exit_code(self) -> int:
        """That of the verdict; 0 where nothing was expected and all was compared."""
        return self.verdict.exit_code if self.verdict else 0

    @property
    def total(self) -> Group:
        """All tensors as one family."""
        return _group("total", self.entries)

    @property
    def families(self) -> tuple[Group, ...]:
        """Those in which something is not the same first, else in the order of their first tensors."""
        found: dict[str, list[Entry]] = {}
        for one in self.entries:
            found.setdefault(one.family, []).append(one)
        groups = [_group(name, members) for name, members in found.items()]
        return tuple(sorted(groups, key=lambda one: one.counts.get("unchanged", 0) == one.tensors))


def _group(name: str, members: Iterable[Entry]) -> Group:
    listed = list(members)
    counts = {status: sum(one.status == status for one in listed) for status in STATUSES}
    return Group(
        name=name,
        tensors=len(listed),
        moved=sum(one.moved and one.status != "reshaped" for one in listed),
        counts={status: count for status, count in counts.items() if count},
        sizes=pooled(one.sizes for one in listed if one.sizes and one.status != "unchanged"),
    )
