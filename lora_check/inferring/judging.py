"""One matrix: how much of its change stands above the noise of storing, and of what rank that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_check.inferring.deltas import Delta, Factors, History, Look, Weighed, look, row_factors, unweighed, weighed
from lora_check.inferring.floors import LARGEST_BESIDE, LARGEST_RANK, ROUNDS, SPARE, STORES, largest_low_rank
from lora_check.inferring.outcome import Change, Kind
from lora_check.inferring.replaying import absorbed, are_echoes, hidden, is_all_there, replayed
from lora_check.inferring.spectrum import Sketch, sketches
from lora_check.rounding import DEVIATIONS, MOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a sketch says of a matrix under one history of its files.

    rank      directions above the floor of that history's noise
    least     directions that there have to be at least, for all of D but the noise to be in them
    ends      the sketch shows them all, and what is left of D is no more than the noise
    """

    rank: int
    least: int
    history: History
    ends: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Where a spectrum ends, and how surely.

    rank     directions above the floor that rounding alone does not make        echoes   those that it does
    hidden   directions after them, below the floor and above what the change shows when it is stored again
    seen     how many after them were looked at
    fits     the directions after those are no weaker than what it shows, either: as many stores as that are seen
    """

    rank: int
    echoes: int
    hidden: int
    seen: int
    fits: bool
    factors: Factors

    @property
    def is_low(self) -> bool:
        """Whether no more directions come after the floor than before it, and the last of them is seen.

        Of a change of many directions most sink into the noise, the more the smaller they are.
        """
        return self.fits and self.hidden <= self.rank and self.hidden < self.seen


def judge(delta: Delta, change: Change) -> tuple[Change, Factors | None]:
    """The kind of change, and the factors that make it, if it is of low rank.

    change   what is known before any number is read
    """
    seen = look(delta)
    known = replace(change, changed=seen.changed, energy=seen.energy, noise=seen.noises[0].total)
    if not seen.finite:
        because = "it holds numbers that are not finite"
        return replace(change, kind=Kind.UNCLEAR, because=because, changed=seen.changed), None
    plain = _plain(seen, delta.shape)
    if plain is not None:
        return replace(known, kind=plain[0], because=plain[1], rows=seen.rows), None
    limit = largest_low_rank(seen.rows, seen.columns)
    heavy = weighed(delta, seen.weights)
    found, verdict = settle(heavy, limit)
    if verdict.ends and verdict.rank == 0:
        told = replace(known, margins=_margins(found, verdict))
        return replace(told, kind=Kind.FAINT, because="changed, but too little is left to tell a rank"), None
    low = verdict if verdict.ends else _unless_hidden(heavy, found, limit)
    if low is not None:
        end = _end(heavy.delta, found, low)
        if end.is_low and _rest(heavy, found, low.rank + end.hidden) <= low.history.noise.most:
            return _low_rank(replace(known, margins=_margins(found, low)), found, low, end), end.factors
    told = replace(known, margins=_margins(found, verdict))
    beside = _beside_row_factors(delta, seen, found, heavy, limit)
    if beside:
        because = f"its rows are rescaled beside a change of rank {beside}"
        return replace(told, kind=Kind.RESCALED_LOW_RANK, rank=beside, margins=(), because=because), None
    return _not_low_rank(seen, told, verdict, limit), None


def _margins(found: Sketch, verdict: Verdict) -> tuple[float, ...]:
    return tuple((found.values / verdict.history.noise.floor).tolist())


def _plain(seen: Look, shape: tuple[int, int]) -> tuple[Kind, str] | None:
    """What no spectrum is needed for."""
    if seen.energy > max(one.most for one in seen.noises) and min(shape) > 1:
        for explained, what in ((seen.by_row, "rows"), (seen.by_column, "columns")):
            if any(seen.energy - explained <= one.most for one in seen.noises):
                return Kind.RESCALED, f"its {what} are those of BASE, each times a number of its own"
    if largest_low_rank(seen.rows, seen.columns) == 0:
        return (Kind.ROWS, "") if seen.rows <= MOST * shape[0] else (Kind.VECTOR, "")
    return None


def settle(heavy: Weighed, limit: int) -> tuple[Sketch, Verdict]:
    """Sketches of more and more columns, until the spectrum ends, or is seen not to.

    limit   the largest rank that is low
    """
    noisiest = heavy.histories[-1].stored(STORES)
    for found in sketches(heavy.delta, min(LARGEST_RANK, limit) + 1 + SPARE):
        verdicts = [_verdict(found, heavy.energy, one) for one in heavy.histories]
        ended = next((one for one in verdicts if one.ends and one.rank <= limit), None)
        if ended is not None:
            return found, ended
        least = max(verdicts[-1].rank, _verdict(found, heavy.energy, noisiest).least)
        if least > limit:
            break
    return found, replace(verdicts[-1], least=least, ends=False)


def _unless_hidden(heavy: Weighed, found: Sketch, limit: int) -> Verdict | None:
    """The first history whose noise could be all that is left, with as many directions below its floor as above it."""
    for one in (*heavy.histories, *(heavy.histories[0].stored(times) for times in range(2, STORES + 1))):
        again = _verdict(found, heavy.energy, one)
        if 0 < again.rank <= limit and _rest(heavy, found, 2 * again.rank) <= one.noise.most:
            return again
    return None


def _rest(heavy: Weighed, found: Sketch, rank: int) -> float:
    """What so many directions leave of |D|^2."""
    return heavy.energy - found.values[:rank].square().sum().item()


def _verdict(found: Sketch, energy: float, history: History) -> Verdict:
    """Weyl: at most rank(delta) singular values of D = delta + E exceed |E|; what is left has to be no more than E.

    The least rank: singular values beyond the first k of a sketch are at most the k-th, so that many of them are needed
    to hold the energy that is left and is no noise. Each k of the leading half, which a sketch knows well, gives one.
    """
    noise, squares = history.noise, found.values.square()
    rank = int((found.values > noise.floor).sum())
    left = energy - squares.cumsum(0)
    room = found.complete or rank + SPARE <= len(squares)
    rest = left[rank - 1].item() if rank else energy
    half = max(1, len(squares) // 2)
    spread = (left[:half] - noise.most).clamp_min(0) / squares[:half].clamp_min(torch.finfo(squares.dtype).tiny)
    needed = torch.where(spread > 0, torch.arange(1, half + 1) + spread, 0).max().item()
    return Verdict(rank=rank, least=max(rank, int(needed)), history=history, ends=room and rest <= noise.most)


def _end(delta: Delta, found: Sketch, verdict: Verdict) -> End:
    """Where the spectrum ends once the change is stored again.

    Where a change moves by less than one last place, what rounding makes of it depends on it, and a change of one
    direction can show several: those after the widest gap are echoes if a change of the rank before it shows them too.
    """
    values, columns = found.values[: verdict.rank], len(found.values)
    rank = _before_widest_gap(values, verdict)
    while True:
        factors = unweighed(found, rank, delta)
        again = replayed(delta, factors, verdict.history, columns)
        if rank == verdict.rank or are_echoes(values[rank:], again[rank : verdict.rank]):
            break
        rank = verdict.rank
    after = _hidden(delta, found, verdict, factors, again)
    return End(
        rank=rank,
        echoes=verdict.rank - rank,
        hidden=after,
        seen=columns - verdict.rank + found.complete,
        fits=verdict.history.stores == 1 or is_all_there(found, again, verdict.rank + after, verdict.history),
        factors=factors,
    )


def _hidden(delta: Delta, found: Sketch, verdict: Verdict, factors: Factors, again: Tensor) -> int:
    """Directions after the floor by either replay: the errors of the one are too small for a rank that is not."""
    times = absorbed(found, verdict.rank)
    after = hidden(found, again, verdict.rank, verdict.history, times)
    if times <= verdict.history.noise.wobble or after > verdict.rank:
        return after
    fresh = replayed(delta, factors, verdict.history, len(found.values), afresh=True)
    return max(after, hidden(found, fresh, verdict.rank, verdict.history))


def _before_widest_gap(values: Tensor, verdict: Verdict) -> int:
    """How many directions come before a gap that is wider than the one between the last and the floor; else all."""
    if len(values) < 2:
        return len(values)
    ratios = values[:-1] / values[1:]
    rank = int(ratios.argmax()) + 1
    return rank if ratios[rank - 1] > values[-1] / verdict.history.noise.floor else len(values)


def _low_rank(told: Change, found: Sketch, verdict: Verdict, end: End) -> Change:
    certain = min(end.rank, int((found.values > verdict.history.noise.bound).sum()))
    return replace(
        told,
        kind=Kind.LOW_RANK,
        rank=end.rank,
        certain=certain,
        hidden=end.hidden,
        stores=verdict.history.stores,
        values=tuple(end.factors.values.tolist()),
        because=f"{end.echoes} more are echoes of rounding so faint a change" if end.echoes else "",
    )


def _beside_row_factors(delta: Delta, seen: Look, found: Sketch, heavy: Weighed, limit: int) -> int:
    """The rank of M - (1 + g) W, if some g for each row leaves one: DoRA writes diag(c) (W + s B A). Else 0.

    g and the row space of the low rank are fitted in turn. Not tried where few rows changed, nor where g explains no
    more of what the leading directions leave of D than chance: 1 / n, the share of any vector in one direction of n.
    """
    if seen.rows <= MOST * delta.shape[0]:
        return 0
    factors = unweighed(found, _widest_gap(found.values), heavy.delta)
    fit = row_factors(delta, factors)
    if fit.explained <= DEVIATIONS * fit.energy / delta.shape[1]:
        return 0
    for _ in range(ROUNDS):
        scaled = weighed(replace(delta, scale=fit.scale), seen.weights)
        shown, verdict = settle(scaled, min(limit, LARGEST_BESIDE))
        if verdict.ends:
            return verdict.rank
        factors = unweighed(shown, _widest_gap(shown.values), scaled.delta)
        fit = row_factors(delta, factors)
    return 0


def _widest_gap(values: Tensor) -> int:
    """How many values come before the largest fall among the leading half."""
    leading = values[: len(values) // 2 + 1].clamp_min(torch.finfo(values.dtype).tiny)
    return int((leading[:-1] / leading[1:]).argmax()) + 1


def _not_low_rank(seen: Look, told: Change, verdict: Verdict, limit: int) -> Change:
    """What a spectrum that does not end is."""
    least = min(verdict.least, seen.rows, seen.columns)
    if seen.rows <= MOST * told.shape[0]:
        return replace(told, kind=Kind.ROWS, rank=least, rows=seen.rows)
    if verdict.least > limit:
        return replace(told, kind=Kind.FULL, rank=least)
    if verdict.rank > LARGEST_RANK:
        because = f"an adapter of a rank above {LARGEST_RANK} would look the same"
        return replace(told, kind=Kind.FULL, rank=least, because=because)
    because = f"{verdict.rank} directions stand above the floor, and more of them sink into the noise of storing"
    return replace(told, kind=Kind.OPEN, rank=least, because=because)
