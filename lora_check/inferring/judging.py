"""One matrix: how much of its change stands above the noise of storing, and of what rank that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_check.inferring.deltas import Delta, Factors, Look, Replayed, Weighed, look, row_factors, unweighed, weighed
from lora_check.inferring.floors import (
    FIRST_SKETCH,
    LARGEST_BESIDE,
    LARGEST_RANK,
    ROUNDS,
    SPARE,
    Noise,
    largest_low_rank,
)
from lora_check.inferring.outcome import Change, Kind
from lora_check.inferring.spectrum import Sketch, sketch
from lora_check.rounding import DEVIATIONS, MOST


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a sketch says of a matrix under one history of its files.

    rank    directions above the floor        noise    of that history
    least   directions that there have to be at least, for all of D but the noise to be in them
    """

    rank: int
    least: int
    noise: Noise
    ends: bool


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
    told = replace(known, margins=tuple((found.values / verdict.noise.floor).tolist()))
    if verdict.ends:
        return _low_rank(heavy.delta, told, found, verdict)
    beside = _beside_row_factors(delta, seen, limit)
    if beside:
        because = f"its rows are rescaled beside a change of rank {beside}"
        return replace(told, kind=Kind.RESCALED_LOW_RANK, rank=beside, margins=(), because=because), None
    return _not_low_rank(seen, told, verdict, limit), None


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
    found: Sketch | None = None
    columns = FIRST_SKETCH
    most = min(LARGEST_RANK, limit) + 1 + SPARE
    while True:
        found = sketch(heavy.delta, min(columns, most), None if found is None else found.right)
        verdicts = [_verdict(found, heavy.energy, noise) for noise in heavy.noises]
        ended = next((one for one in verdicts if one.ends and one.rank <= limit), None)
        widest = verdicts[-1]
        if ended is not None:
            return found, ended
        if widest.least > limit or found.complete or columns >= most:
            return found, replace(widest, ends=False)
        columns *= 2


def _verdict(found: Sketch, energy: float, noise: Noise) -> Verdict:
    """Weyl: at most rank(delta) singular values of D = delta + E exceed |E|; what is left has to be no more than E.

    The least rank: singular values beyond the leading half of a sketch are at most the last of that half, so that many
    of them are needed to hold the energy that is left and is no noise.
    """
    values = found.values
    rank = int((values > noise.floor).sum())
    left = energy - values[:rank].square().sum().item()
    room = found.complete or rank + SPARE <= len(values)
    half = max(1, len(values) // 2)
    spread = energy - values[:half].square().sum().item() - noise.most
    beyond = spread / values[half - 1].item() ** 2 if spread > 0 and values[half - 1] > 0 else 0
    return Verdict(rank, max(rank, int(half + beyond) if spread > 0 else 0), noise, room and left <= noise.most)


def _low_rank(delta: Delta, told: Change, found: Sketch, verdict: Verdict) -> tuple[Change, Factors | None]:
    if verdict.rank == 0:
        return replace(told, kind=Kind.FAINT, because="changed, but too little is left to tell a rank"), None
    rank = _without_echoes(delta, found, verdict)
    certain = min(rank, int((found.values > verdict.noise.bound).sum()))
    because = "" if rank == verdict.rank else f"{verdict.rank - rank} more are echoes of rounding so faint a change"
    factors = unweighed(found, rank, delta)
    values = tuple(factors.values.tolist())
    return replace(told, kind=Kind.LOW_RANK, rank=rank, certain=certain, values=values, because=because), factors


def _without_echoes(delta: Delta, found: Sketch, verdict: Verdict) -> int:
    """The rank before the widest gap, if a change of that rank, rounded as MERGED is, shows the further directions too.

    Where a change moves by less than one last place, what rounding makes of it depends on it, and a change of one
    direction can show several. Explained is a direction of whose energy most is there again.
    """
    values = found.values[: verdict.rank]
    if verdict.rank < 2:
        return verdict.rank
    ratios = values[:-1] / values[1:]
    rank = int(ratios.argmax()) + 1
    if ratios[rank - 1] <= values[-1] / verdict.noise.floor:
        return verdict.rank
    again = Replayed(of=delta, factors=unweighed(found, rank, delta))
    shown = sketch(again, verdict.rank + SPARE).values[: verdict.rank]
    return rank if bool((shown.square() >= MOST * values.square())[rank:].all()) else verdict.rank


def _beside_row_factors(delta: Delta, seen: Look, limit: int) -> int:
    """The rank of M - (1 + g) W, if some g for each row leaves one: DoRA writes diag(c) (W + s B A). Else 0.

    g and the low rank are fitted in turn, each round leaving about r / n of the error of the one before. Not tried
    where g explains no more of D than chance: 1 / n, the share of any vector in one direction of n.
    """
    if seen.by_row <= DEVIATIONS * seen.energy / delta.shape[1]:
        return 0
    factors: Factors | None = None
    for _ in range(ROUNDS):
        scaled = weighed(replace(delta, scale=row_factors(delta, factors)), seen.weights)
        found, verdict = settle(scaled, min(limit, LARGEST_BESIDE))
        if verdict.ends:
            return verdict.rank
        factors = unweighed(found, _widest_gap(found.values), scaled.delta)
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
    because = f"{verdict.rank} directions stand out, and more is left beside them than storing explains"
    return replace(told, kind=Kind.UNCLEAR, rank=verdict.rank, because=because)
