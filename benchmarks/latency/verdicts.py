"""What a time is worth, and what explains it: a word and a reason for every row and clock.

    invalid         it cannot be: not checked, or below what no implementation can beat by more than the A/A spread
    noisy           it says nothing: the overhead is within the A/A spread, or there is no A/A to hold it against
    at floor        no implementation could do better by more than the run can tell
    launch-bound    launches, or the wait for the host, explain more than half of what it costs over merged
    traffic-bound   bytes passed between its kernels may explain more than half of it
    ok              none of these

Three things make a time invalid, each of them impossible and not merely surprising:

- it is below the hard floor (`floors`), which counts no byte of a hot cell and no activation at all;
- kernels of its own beside the base product cost less than these alone must, `floors.beyond` over the measured merged:
  the base product is merged's, and what is added to it cannot take less than nothing. A backend of one fused kernel
  brings a base product of its own, which may well be better than the library's: only the floor in seconds holds for it;
- the yardstick of its clock is invalid itself.

A clock that includes the host can only be above the device's time, so that the floors hold for every clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

from benchmarks.latency import floors
from benchmarks.latency.figures import overhead, spread, summary
from benchmarks.latency.nouns import Ceilings, Measured, Row
from benchmarks.latency.traffic import OWN, kernels, of

Word = Literal["ok", "at floor", "launch-bound", "traffic-bound", "noisy", "invalid"]
Key = tuple[str, bool, str]
"""Backend, again, clock."""

WALL, BUSY = "eager_wall", "device_busy"
MAJORITY = 0.5
"""What explains more than this share of a cost is its main cause: two causes cannot both be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The word, and what it follows from; seconds, and shares of 1.

    floor      the hard floor                                  low, high   the bracket of its own traffic
    share      of the peak that binds                         launches    (wall - busy) / wall, None: not known
    overhead   over merged, None for merged itself            spread      of the A/A, None: not known
    least      the overhead that kernels of its own must have beside a base product as slow as merged
    """

    word: Word
    reason: str
    floor: float
    low: float
    high: float
    share: float
    overhead: float | None = None
    spread: float | None = None
    least: float = 0.0
    launches: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that a rule may look at; seconds of one call, `merged` those of the yardstick by the same clock.

    launching   (how many more kernels than merged, whether they were seen or only counted, seconds of one), or None
    passing     seconds that its traffic may take beyond merged's, at most; a single fused kernel passes nothing on
    same        its base product is that of merged
    ideal       the overhead of one fused kernel at its roofline
    """

    row: Row
    median: float
    merged: float | None
    judged: Judgement
    launching: tuple[int, str, float] | None
    passing: float
    same: bool
    ideal: float

    @property
    def yardstick(self) -> bool:
        """Merged, or merged again."""
        return self.row.merged

    @property
    def excess(self) -> float:
        """Seconds over merged, from the ratios of paired rounds."""
        return (self.judged.overhead or 0.0) * (self.merged or 0.0)


Said = tuple[Word, str] | None


def judged(measured: Measured, ceilings: Ceilings) -> dict[Key, Judgement]:
    """(backend, again, clock) -> Judgement of every row that has samples by that clock; others say themselves why not.

    raises   InputError: a dtype of the cell has no ceiling, or a row names a traffic that nobody counted
    """
    merged = next((row for row in measured.rows if row.merged and not row.again), None)
    found = {
        (row.backend, row.again, clock): judgement(gathered(measured, ceilings, row, merged, clock))
        for row in measured.rows
        for clock, timing in row.clocks.items()
        if timing.samples
    }
    return found if merged is None else {key: beside(one, found, merged, key) for key, one in found.items()}


def beside(one: Judgement, found: Mapping[Key, Judgement], merged: Row, key: Key) -> Judgement:
    """A judgement, or `invalid` where its yardstick is."""
    yardstick = found.get((merged.backend, False, key[2]))
    if yardstick is None or yardstick.word != "invalid" or one.word == "invalid":
        return one
    return replace(one, word="invalid", reason=f"its yardstick is invalid: {yardstick.reason}")


def judgement(evidence: Evidence) -> Judgement:
    """The word of the first rule that applies."""
    word, reason = next(said for rule in RULES if (said := rule(evidence)))
    return replace(evidence.judged, word=word, reason=reason)


def invalid(run: Iterable[Mapping[Key, Judgement]]) -> int:
    """How many times are invalid in all cells of a run."""
    return sum(one.word == "invalid" for found in run for one in found.values())


# -------------------------------------------------------------------------------------------------------- evidence


def gathered(measured: Measured, ceilings: Ceilings, row: Row, merged: Row | None, clock: str) -> Evidence:
    """What is known of one row by one clock."""
    cell, cold = measured.cell, measured.cell.cache == "cold"
    modules = of(cell, measured.modules, row.adapter)
    median, reference = summary(row.clocks[clock]).median, middle(merged, clock)
    plain = kernels("merged", modules)
    own = plain if row.merged else kernels(row.traffic, modules)
    low, high = floors.expected(own, ceilings, cold=cold)
    over = None if row.merged else overhead(row, merged, clock)
    positive = median > 0 and isfinite(median)
    share = floors.peak(modules, median, ceilings, cold=cold, adapted=not row.merged).larger if positive else 0.0
    least = floors.beyond(modules, ceilings, cold=cold) / reference if reference and not row.merged else 0.0
    return Evidence(
        row=row,
        median=median,
        merged=reference,
        judged=Judgement(
            word="ok",
            reason="",
            floor=floors.hard(modules, ceilings, cold=cold, adapted=not row.merged),
            low=low,
            high=high,
            share=share,
            overhead=over.median if over else None,
            spread=spread(measured, clock),
            least=least,
            launches=waiting(row) if clock == WALL else None,
        ),
        launching=launching(row, merged, len(own) - len(plain), ceilings.launch.get(clock)),
        passing=0.0 if row.traffic == "fused" else high - floors.expected(plain, ceilings, cold=cold)[1],
        same=row.traffic not in OWN and cell.adapters == 1,
        ideal=floors.least_overhead(modules, ceilings),
    )


def middle(row: Row | None, clock: str) -> float | None:
    """Median seconds, where there are any."""
    timing = row.clocks.get(clock) if row else None
    return summary(timing).median if timing and timing.samples else None


def waiting(row: Row) -> float | None:
    """The share of an eager call in which the device waits for its host.

    None where one of the clocks is missing, or where no kernels are seen: a CPU waits for nobody, and what its wall
    clock shows beyond its own seconds belongs to other processes.
    """
    wall, busy = middle(row, WALL), middle(row, BUSY)
    return floors.launch_share(wall, busy) if wall and busy and row.kernels is not None else None


def launching(row: Row, merged: Row | None, counted: int, seconds: float | None) -> tuple[int, str, float] | None:
    """Kernels beyond those of merged, as seen, else as its traffic has them; None where a launch has no price."""
    if seconds is None or merged is None:
        return None
    if row.kernels is not None and merged.kernels is not None:
        return row.kernels - merged.kernels, "seen", seconds
    return counted, "counted", seconds


# ----------------------------------------------------------------------------------------------------------- rules


def unchecked(e: Evidence) -> Said:
    """A time without a number, or of an output that nobody found right."""
    if not (e.median > 0 and isfinite(e.median)):
        return "invalid", f"{e.median} is no time"
    gate = e.row.gate
    if gate is None:
        return None if e.row.again else ("invalid", "its output was never held to the budget")
    if gate.wrong or not gate.share <= 1:
        return (
            "invalid",
            f"it was timed although its output is wrong: {gate.wrong or f'{gate.share:.3g} of the budget'}",
        )
    return None


def below_floor(e: Evidence) -> Said:
    """Faster than the device can be."""
    margin = e.judged.spread or 0.0
    if e.median >= e.judged.floor * (1 - margin):
        return None
    return "invalid", (
        f"{us(e.median)} is {percent(1 - e.median / e.judged.floor)} below the floor of {us(e.judged.floor)}, "
        f"more than the A/A spread of {percent(margin)}"
    )


def below_least(e: Evidence) -> Said:
    """Less over merged than the kernels that it adds must take."""
    over, margin = e.judged.overhead, e.judged.spread or 0.0
    if over is None or not e.same or over >= e.judged.least - margin:
        return None
    return "invalid", (
        f"{signed(over)} over merged, and its kernels must add {percent(e.judged.least)}: "
        f"further below than the A/A spread of {percent(margin)}"
    )


def noisy(e: Evidence) -> Said:
    """An overhead that cannot be told from none."""
    if e.yardstick:
        return None
    if e.judged.overhead is None:
        return "noisy", "merged has no time in the same rounds to compare with"
    if e.judged.spread is None:
        return "noisy", "no A/A by this clock: how far two equal rows differ is not known"
    if abs(e.judged.overhead) > e.judged.spread:
        return None
    return "noisy", f"{signed(e.judged.overhead)} over merged is within the A/A spread of {percent(e.judged.spread)}"


def at_floor(e: Evidence) -> Said:
    """As near to the floor as a run can tell that tells the floor from nothing: gap <= spread <= least overhead."""
    margin = e.judged.spread
    if margin is None or margin > e.ideal:
        return None
    if e.judged.floor and e.median <= e.judged.floor * (1 + margin):
        return "at floor", f"within {percent(margin)} of the floor of {us(e.judged.floor)}"
    over = e.judged.overhead
    if over is None or over < 0 or over > e.ideal + margin:
        return None
    return "at floor", f"{signed(over)} over merged, and one fused kernel cannot do with less than {percent(e.ideal)}"


def faster(e: Evidence) -> Said:
    """It beats merged where that can be: with a product of its own, or one product in place of several."""
    if e.judged.overhead is None or e.judged.overhead >= 0:
        return None
    return "ok", f"{percent(-e.judged.overhead)} faster than merged, whose products are other ones"


def bound(e: Evidence) -> Said:
    """What explains most of the cost over merged: waiting for the host, launches, or bytes."""
    if e.judged.launches is not None and e.judged.launches > MAJORITY:
        return "launch-bound", f"the device waits for its host in {percent(e.judged.launches)} of the time"
    if e.excess <= 0:
        return None
    many, how, each = e.launching or (0, "seen", 0.0)
    parts: Sequence[tuple[float, Word, str]] = (
        (many * each, "launch-bound", f"{many} more kernels than merged ({how}), {us(each)} each"),
        (e.passing, "traffic-bound", f"its passes over memory take up to {us(e.passing)}"),
    )
    cost, word, why = max(parts)
    return (word, f"{why}, of {us(e.excess)} over merged") if cost > MAJORITY * e.excess else None


def ok(e: Evidence) -> Said:
    """Nothing more to say; for merged, how far it is from what the device can do."""
    if e.yardstick:
        return "ok", f"{percent(e.judged.share)} of the peak that binds"
    unknown = "" if e.launching else "; what launches cost by this clock was not measured"
    return "ok", f"neither launches nor passes over memory explain most of it{unknown}"


RULES: tuple[Callable[[Evidence], Said], ...] = (
    unchecked,
    below_floor,
    below_least,
    noisy,
    at_floor,
    faster,
    bound,
    ok,
)


def us(seconds: float) -> str:
    """Three digits and a unit."""
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def percent(share: float) -> str:
    """Two digits, or one place."""
    return f"{100 * share:,.1f} %" if abs(share) >= 0.0995 else f"{100 * share:.2g} %"


def signed(share: float) -> str:
    """With its sign."""
    return f"{'+' if share >= 0 else '-'}{percent(abs(share))}"
