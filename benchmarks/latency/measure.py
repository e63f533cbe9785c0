"""Subject x backends x clocks -> Rows: built once, gated, then measured in rounds.

A round measures every backend once by every clock. Each round has an order of its own, and the yardstick is measured
twice, as if it were two backends: their difference, the A/A, is what a run cannot tell apart. Times are compared within
a round, sample by sample: what slows a machine down for a second slows all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TypeVar

from torch import Tensor, nn

from benchmarks.latency.gate import Trial, build, installed, judge, reason
from benchmarks.latency.nouns import Backend, Clock, Place, Row, Site, Subject, Timed, Timing
from benchmarks.latency.place import peak, settled
from benchmarks.latency.watch import BlindError, start

LEAST_ROUNDS = 6
"""Rounds that are measured whatever they cost: fewer samples have no interval at 95 %, and `compare` needs one."""
GRAPH = "graph_replay"
"""The clock that has nothing to measure where the gate found a backend wrong under graph replay."""

Item = TypeVar("Item")


@dataclass(slots=True, kw_only=True, eq=False)
class Runner:
    """A backend in the rounds, or the yardstick once more: by clock what measures once, its samples, or why none."""

    trial: Trial
    again: bool = False
    samplers: dict[str, Callable[[], float]] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    kernels: int | None = None
    calls: tuple[Callable[[], Tensor], ...] = ()

    def prepare(self, subject: Subject, clocks: Sequence[Clock], place: Place) -> None:
        """Warm up under every clock that there is for it."""
        self.calls = tuple(partial(subject.call, *one) for one in zip(subject.copies, subject.inputs, strict=True))
        timed = Timed(name=self.trial.backend.name, calls=self.calls)
        for clock in clocks:
            missing = clock.missing(place) or (self.trial.fixed if clock.name == GRAPH else "")
            if missing:
                self.missing[clock.name] = missing
                continue
            try:
                with installed(subject, self.trial.modules):
                    self.samplers[clock.name] = clock.prepare(timed, place)
            except Exception as error:  # noqa: BLE001 - whatever is raised is why there is no time
                self.missing[clock.name] = reason(error)

    def measure(self, subject: Subject, *, keep: bool) -> None:
        """One sample by every clock, after a round that no clock sees: what ran before is not felt in the sample.

        A clock that fails once has no samples at all.
        """
        with installed(subject, self.trial.modules):
            try:
                for call in self.calls if self.samplers else ():
                    call()
            except Exception as error:  # noqa: BLE001 - whatever is raised is why there is no time
                for name in tuple(self.samplers):
                    self.drop(name, error)
            for name, sampler in tuple(self.samplers.items()):
                try:
                    sample = sampler()
                except Exception as error:  # noqa: BLE001 - whatever is raised is why there is no time
                    self.drop(name, error)
                    continue
                if keep:
                    self.samples.setdefault(name, []).append(sample)
                self.kernels = getattr(sampler, "kernels", None) or self.kernels

    def drop(self, name: str, error: BaseException) -> None:
        """No samples by a clock, and why."""
        self.missing[name] = reason(error)
        del self.samplers[name]
        self.samples.pop(name, None)

    def row(self, memory: int | None) -> Row:
        """What the table has of it."""
        trial, backend = self.trial, self.trial.backend
        timings = {name: Timing(samples=tuple(samples)) for name, samples in self.samples.items()}
        timings.update({name: Timing(missing=missing) for name, missing in self.missing.items()})
        return Row(
            backend=backend.name,
            about=backend.about,
            adapter=backend.adapter,
            traffic=backend.traffic,
            merged=backend.merged,
            again=self.again,
            missing=trial.missing,
            gate=trial.gate,
            clocks=timings if trial.open else {},
            kernels=self.kernels,
            memory=memory if trial.open else None,
        )


def measured(
    subject: Subject,
    backends: Sequence[Backend],
    clocks: Sequence[Clock],
    place: Place,
    *,
    rounds: int = 20,
    budget: float = 2.0,
) -> tuple[Row, ...]:
    """Gate every backend and measure those that pass: a Row each, in their order, the A/A behind the one it repeats.

    rounds, budget   LEAST_ROUNDS are measured; then on until it is that many rounds or that many seconds are spent
    returns          for every backend a Row, with the reason in words where it has no time: none is left out
    """
    with settled(place):
        trials = [build(subject, backend, place) for backend in backends]
        try:
            judge(subject, trials, place)
        except BlindError as error:
            for trial in trials:
                trial.missing = trial.missing or f"not timed, as the gate could not see: {error.message}"
        memory = memories(subject, trials, place)
        runners = [Runner(trial=trial, again=again) for trial in trials for again in repeated(trial, trials)]
        for runner in runners:
            if runner.trial.open:
                runner.prepare(subject, clocks, place)
        run(subject, [runner for runner in runners if runner.samplers], place, rounds, budget)
    return tuple(runner.row(memory.get(runner.trial.backend.name)) for runner in runners)


def repeated(trial: Trial, trials: Sequence[Trial]) -> tuple[bool, ...]:
    """Once for a backend; the first merged one is measured again."""
    first = next((one for one in trials if one.backend.merged), None)
    return (False, True) if trial is first else (False,)


def run(subject: Subject, runners: Sequence[Runner], place: Place, rounds: int, budget: float) -> None:
    """The rounds, each in an order of its own.

    On a GPU one before them is thrown away: capturing graphs has given free memory back to the device, and the next
    call has to ask for it again.
    """
    for runner in runners if place.kind == "cuda" else ():
        runner.measure(subject, keep=False)
    began = time.perf_counter()
    for number in range(max(rounds, LEAST_ROUNDS)):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > budget:
            return
        for runner in shuffled(runners, number):
            runner.measure(subject, keep=True)


def shuffled(items: Sequence[Item], number: int) -> list[Item]:
    """The same items in the order of a round. To rotate them would keep every neighbour, and with it what it leaves."""
    return Random(number).sample(items, len(items))  # noqa: S311 - an order, and the same one in every run


# ---------------------------------------------------------------------------------------------------------- memory


def memories(subject: Subject, trials: Sequence[Trial], place: Place) -> dict[str, int]:
    """Bytes that each backend needs above those of merged: what it holds, and its peak during a call; GPU only.

    merged holds its own weights in place of the base, all others hold theirs beside it; per copy.
    """
    needed = {}
    for trial in (one for one in trials if one.open):
        with installed(subject, trial.modules):
            transient = peak(place, partial(subject.call, subject.copies[0], subject.inputs[0]))
        if transient is not None:
            needed[trial.backend.name] = transient + held(trial, subject)
    base = next((needed.get(one.backend.name) for one in trials if one.backend.merged), None)
    return {} if base is None else {name: size - base for name, size in needed.items()}


def held(trial: Trial, subject: Subject) -> int:
    """Bytes of all tensors that a backend keeps for one copy; merged needs no base."""
    bases = {start(parameter): parameter for site in subject.sites[0].values() for parameter in site.base.parameters()}
    found = {start(tensor): tensor for module in trial.modules[0].values() for tensor in tensors(module)}
    kept = {key: one for key, one in found.items() if key not in bases} if trial.backend.merged else {**found, **bases}
    return sum(one.untyped_storage().nbytes() for one in kept.values())


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and plain attributes of a module and all below it."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


# ----------------------------------------------------------------------------------------------------------- merge


def merge(subject: Subject, clock: Clock, place: Place, *, rounds: int = 20, budget: float = 2.0) -> Timing:
    """Seconds of W += s B A for all targets of one copy, by one clock.

    Timed is one `addmm_` for each target, into a copy of W that is there already: products and sum in float32, stored
    once in the dtype of W. It goes round the copies like a forward, and adds the delta again and again, which takes
    no other time.
    """
    with settled(place):
        try:
            weights = [{path: site.base.weight.clone() for path, site in sites.items()} for sites in subject.sites]
            calls = tuple(partial(merged, *one) for one in zip(weights, subject.sites, strict=True))
            if clock.missing(place):
                return Timing(missing=clock.missing(place))
            sampler, samples = clock.prepare(Timed(name="merge", calls=calls), place), list[float]()
            sampler()
            began = time.perf_counter()
            while len(samples) < LEAST_ROUNDS or (len(samples) < rounds and time.perf_counter() - began <= budget):
                samples.append(sampler())
        except Exception as error:  # noqa: BLE001 - whatever is raised is why there is no time
            return Timing(missing=reason(error))
    return Timing(samples=tuple(samples))


def merged(weights: Mapping[str, Tensor], sites: Mapping[str, Site]) -> Tensor:
    """Add s B A to every weight, in place; the last of them."""
    for path, site in sites.items():
        last = weights[path].addmm_(site.b[0], site.a[0], alpha=site.s)
    return last
