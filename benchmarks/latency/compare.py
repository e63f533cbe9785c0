"""Two runs, A before and B after: what became slower, what faster, and what cannot be told.

Rows are matched by (cell, backend, adapter dtype) and clock. The ratio B / A of their medians has an interval by
bootstrap, and the A/A of both runs says which changes a run sees where nothing changed:

    same               the interval lies within the A/A of both runs
    faster, slower     it lies outside the A/A of both
    ambiguous          anything else, with the reason

Seconds are compared, and overhead: (1 + overhead of B) / (1 + overhead of A), each over merged of its own run. Seconds
of different devices are not comparable; overheads are still shown. What A timed and B did not is `lost`, never skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, isfinite, log2
from typing import Any

import numpy as np

from benchmarks.latency.figures import of, ratios, spread
from benchmarks.latency.nouns import Cell, Measured, Results, Row
from benchmarks.latency.results import FINISHED, encoded
from benchmarks.latency.table import (
    CLOCKS,
    Table,
    clocks_of,
    figure,
    label,
    percent,
    seconds,
    text,
    untimed,
    wrapped,
    yardstick,
)

LEVEL = 0.95
"""Of the intervals: one in twenty does not hold its ratio, though nothing is wrong."""
FEWEST = ceil(1 - log2(1 - LEVEL))
"""Samples below which no interval of a median has that level: all n lie on one side of it with probability 2 / 2^n."""
RESAMPLES = 999
WORDS = ("slower", "faster", "same", "ambiguous", "not comparable", "lost", "new")
CHANGED = ("slower", "lost", "faster", "new")
"""What is listed unless everything is asked for, the worst first; the rest is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """From `before` to `after`: their ratio, its interval (None where there is none), one of WORDS and why."""

    before: float
    after: float
    ratio: float
    low: float | None
    high: float | None
    word: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One row by one clock in both runs.

    seconds    of a call; None: one of the runs has none          overhead   1 + overhead; None: merged, or none
    word       of WORDS, that of the seconds
    """

    cell: Cell
    backend: str
    adapter: str
    clock: str
    word: str
    reason: str
    seconds: Shift | None = None
    overhead: Shift | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """B beside A.

    apart     why seconds cannot be compared, else empty
    differs   what else differs between the environments, in words
    """

    pairs: tuple[Pair, ...]
    apart: str
    differs: tuple[str, ...]

    def count(self, word: str) -> int:
        """Pairs of which that is said."""
        return sum(pair.word == word for pair in self.pairs)

    @property
    def comparable(self) -> bool:
        """Whether seconds were compared at all."""
        return not self.apart and any(pair.seconds for pair in self.pairs)

    @property
    def slower(self) -> int:
        """Rows that B runs slower."""
        return self.count("slower")

    @property
    def lost(self) -> int:
        """Rows that A timed and B did not."""
        return self.count("lost")

    @property
    def ambiguous(self) -> int:
        """Rows of which nothing can be said."""
        return self.count("ambiguous")


# ------------------------------------------------------------------------------------------------------- comparing


def compared(a: Results, b: Results) -> Comparison:
    """Every row of either run, matched."""
    apart = different_devices(a.environment, b.environment)
    before, after = rows_of(a), rows_of(b)
    keys = list(dict.fromkeys((*before, *after)))
    pairs = [one for key in keys for one in pairs_of(key, before.get(key), after.get(key), apart)]
    return Comparison(pairs=tuple(pairs), apart=apart, differs=differences(a.environment, b.environment))


Key = tuple[Cell, str, str]
Found = tuple[Measured, Row]


def rows_of(results: Results) -> dict[Key, Found]:
    """(cell, backend, adapter dtype) -> where it is; the A/A is no row of its own."""
    return {
        (measured.cell, row.backend, row.adapter): (measured, row)
        for measured in results
        for row in measured.rows
        if not row.again
    }


def pairs_of(key: Key, before: Found | None, after: Found | None, apart: str) -> list[Pair]:
    """One row by every clock that timed it in either run."""
    clocks = clocks_of([one[1] for one in (before, after) if one])
    found = [pair(key, clock, before, after, apart) for clock in clocks]
    return [one for one in found if one]


def pair(key: Key, clock: str, before: Found | None, after: Found | None, apart: str) -> Pair | None:
    """One row by one clock in both runs; None where neither has a time."""
    named = partial(Pair, cell=key[0], backend=key[1], adapter=key[2], clock=clock)
    without = [untimed(one[1], clock) if one else "not in this run" for one in (before, after)]
    if all(without):
        return None
    if before is None or after is None or any(without):
        word, reason = ("lost", f"in B: {without[1]}") if without[1] else ("new", f"in A: {without[0]}")
        return named(word=word, reason=reason)
    spreads = [spread(measured, clock) for measured, _ in (before, after)]
    timed = shift(before[1].clocks[clock].samples, after[1].clocks[clock].samples, spreads, apart)
    over = None if before[1].merged else normalised(before, after, clock, spreads)
    return named(word=timed.word, reason=timed.reason, seconds=timed, overhead=over)


def normalised(before: Found, after: Found, clock: str, spreads: Sequence[float | None]) -> Shift | None:
    """The shift of row over merged, round by round, each of its own run; None where the rounds do not pair."""
    a, b = (ratios(row, yardstick(measured), clock) for measured, row in (before, after))
    return shift(a, b, spreads) if a and b else None


def shift(a: Sequence[float], b: Sequence[float], spreads: Sequence[float | None], apart: str = "") -> Shift:
    """From the samples a to the samples b, judged by the A/A of both runs."""
    before, after = of(tuple(a)).median, of(tuple(b)).median
    low, high = interval(a, b)
    word, reason = ("not comparable", apart) if apart else judged(len(a), len(b), (low, high), spreads)
    return Shift(before=before, after=after, ratio=after / before, low=low, high=high, word=word, reason=reason)


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """Where the ratio of the medians b / a lies, at LEVEL; None where there are too few samples."""
    from scipy.stats import bootstrap

    if min(len(a), len(b)) < FEWEST or not all(isfinite(one) and one > 0 for one in (*a, *b)):
        return None, None
    found = bootstrap(
        (np.asarray(a), np.asarray(b)),
        lambda x, y, axis: np.median(y, axis=axis) / np.median(x, axis=axis),
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)


def judged(
    n: int, m: int, where: tuple[float | None, float | None], spreads: Sequence[float | None]
) -> tuple[str, str]:
    """One of WORDS, and why, for n and m samples with that interval of their ratio."""
    low, high = where
    if min(n, m) < FEWEST:
        return "ambiguous", f"too few samples: {n} and {m}, an interval at {LEVEL:.0%} needs {FEWEST}"
    if low is None or high is None:
        return "ambiguous", "samples that are no times"
    known = [one for one in spreads if one is not None]
    if len(known) < 2:
        return "ambiguous", "no A/A in one of the runs"
    least, most = min(known), max(known)
    if 1 - least <= low and high <= 1 + least:
        return "same", f"within the A/A of {100 * least:.1f} %"
    if low > 1 + most:
        return "slower", f"beyond the A/A of {100 * most:.1f} %"
    if high < 1 - most:
        return "faster", f"beyond the A/A of {100 * most:.1f} %"
    if 1 - most <= low and high <= 1 + most:
        return (
            "ambiguous",
            f"the A/A is wider than the change: {100 * most:.1f} % in one run, {100 * least:.1f} % in the other",
        )
    return "ambiguous", f"the interval straddles the A/A of {100 * most:.1f} %"


# ----------------------------------------------------------------------------------------------------- environments


def different_devices(a: Mapping[str, object], b: Mapping[str, object]) -> str:
    """Why seconds of two environments cannot be compared; empty if they can."""
    names = [name_of(one) for one in (a, b)]
    if None in names:
        return "a run does not say on which device it was made"
    return "" if names[0] == names[1] else f"different devices: {names[0]}, and {names[1]}"


def name_of(environment: Mapping[str, object]) -> str | None:
    """What the device is called."""
    device = environment.get("device")
    name = device.get("name") if isinstance(device, Mapping) else None
    return str(name) if name else None


def differences(a: Mapping[str, object], b: Mapping[str, object]) -> tuple[str, ...]:
    """What has to be known of two environments before their times are read."""
    one, other = (flat(environment) for environment in (a, b))
    told = [
        f"{key}: {one.get(key, 'not told')}, then {other.get(key, 'not told')}"
        for key in dict.fromkeys((*one, *other))
        if one.get(key) != other.get(key)
    ]
    short = [f"{name} was cut short" for name, found in (("A", a), ("B", b)) if found.get(FINISHED) is False]
    return (*short, *told)


def flat(environment: Mapping[str, object]) -> dict[str, object]:
    """`versions.torch` -> its value, of everything that can make a difference to a time."""
    kept = ("commit", "seed", "device", "processor", "versions", "precision", "threads")
    return {
        f"{key}.{name}".rstrip("."): found
        for key in kept
        if (value := environment.get(key)) is not None
        for name, found in (value.items() if isinstance(value, Mapping) else [("", value)])
    }


# ------------------------------------------------------------------------------------------------------- the faces


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """For JSON."""
    return {
        "schema": 1,
        "comparable": comparison.comparable,
        "apart": comparison.apart,
        "differs": list(comparison.differs),
        "counts": {word: comparison.count(word) for word in WORDS},
        "ratios": mean_ratios(comparison.pairs),
        "pairs": [encoded(pair) for pair in comparison.pairs],
    }


def page(comparison: Comparison, *, everything: bool = False) -> str:
    """What a person reads: what differs, the rows that changed or all, the overall line."""
    head = [f"not comparable: {comparison.apart}; only overheads over merged of the own run are"] * bool(
        comparison.apart
    )
    differs = [f"differs: {line}" for line in comparison.differs]
    parts = ["\n".join(wrapped([*head, *differs])), *map(text, tables(comparison, everything))]
    parts.append("\n".join(wrapped([overall(comparison)])))
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(comparison: Comparison, everything: bool) -> list[Table]:
    """A table for each cell with rows to show."""
    wanted = WORDS if everything or comparison.apart else CHANGED
    shown = sorted((one for one in comparison.pairs if one.word in wanted), key=lambda one: wanted.index(one.word))
    cells = dict.fromkeys(pair.cell for pair in shown)
    return [cell_table(cell, [pair for pair in shown if pair.cell == cell]) for cell in cells]


def cell_table(cell: Cell, pairs: Sequence[Pair]) -> Table:
    """The rows of one cell; the reasons below."""
    reasons = list(dict.fromkeys(pair.reason for pair in pairs))
    rows = [(*line(pair), f"{pair.word} [{reasons.index(pair.reason) + 1}]") for pair in pairs]
    heads = ("", "clock", "A", "B", "B/A", "A over %", "B over %", "(1+B)/(1+A)", "")
    notes = tuple(f"[{at}] {reason}" for at, reason in enumerate(reasons, 1))
    return Table(title=label(cell), heads=heads, rows=tuple(rows), notes=notes)


def line(pair: Pair) -> list[str]:
    """A row but for its word."""
    timed, over = pair.seconds, pair.overhead
    found = [seconds(timed.before), seconds(timed.after), ratio(timed)] if timed else ["-"] * 3
    relative = [percent(over.before - 1), percent(over.after - 1), ratio(over)] if over else ["-"] * 3
    return [pair.backend, pair.clock, *found, *relative]


def ratio(one: Shift) -> str:
    """1.02 (1.01-1.04)."""
    between = f" ({one.low:.2f}-{one.high:.2f})" if one.low is not None and one.high is not None else ""
    return f"{figure(one.ratio)}{between}"


def mean_ratios(pairs: Iterable[Pair]) -> dict[str, float]:
    """The geometric mean of B / A by clock."""
    from scipy.stats import gmean

    found: dict[str, list[float]] = {}
    for one in pairs:
        if one.seconds and isfinite(one.seconds.ratio) and one.seconds.ratio > 0:
            found.setdefault(one.clock, []).append(one.seconds.ratio)
    return {clock: float(gmean(found[clock])) for clock in sorted(found, key=(*CLOCKS, *sorted(found)).index)}


def overall(comparison: Comparison) -> str:
    """The counts, and the mean of the ratios."""
    counts = Counter(pair.word for pair in comparison.pairs)
    told = ", ".join(f"{counts[word]} {word}" for word in WORDS if counts[word]) or "no row is in both"
    means = mean_ratios(comparison.pairs) if not comparison.apart else {}
    ratios_told = ", ".join(f"{value:.3f} by {clock}" for clock, value in means.items())
    ending = f"; B/A on the whole (geometric mean): {ratios_told}" if ratios_told else ""
    return f"{len(comparison.pairs)} times compared: {told}{ending}"
