"""The middle of the line: every item compared, then the refuted tensors named, by one engine, into one journal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_check import registry
from lora_check.diagnose import Known
from lora_check.distributed import errand, perform
from lora_check.errors import UsageError
from lora_check.findings import Diagnosis, assign, conclude
from lora_check.fingerprint import fingerprint
from lora_check.inputs import Opened
from lora_check.items import Item, Request, item, items, shard, sizes_of
from lora_check.journal import Head, Journal, Parts, heads_of
from lora_check.means import Means, cores
from lora_check.naming import name_all
from lora_check.reading.meter import metered
from lora_check.reading.plain import is_plain
from lora_check.reading.throughput import Throughput
from lora_check.types import Comparison, Engine, Finding
from lora_check.work import Job, Outcome, Refuted

SMALL = 1 << 24
"""Bytes of both models that an item has on average where threads are worth having that wait for no network: those of
one interpreter take turns with all that is not arithmetic, and below that two are slower than one."""

Judged = tuple[tuple[Comparison, ...], tuple[Finding, ...], Throughput | None]


def judged(request: Request, means: Means, job: Job) -> Judged:
    """Compare every item, name the mistakes in the tensors that are refuted, and pool what was seen; and the speed."""
    engine = registry.load("engines")[means.engine]
    with _remembered(request, means, job) as journal, nullcontext() if means.lasting else closing(engine):
        work = partial(perform, errand(request, job)) if engine.remote else job.perform
        done = dict(journal.done) if journal else {}
        return _Crew(job=job, engine=engine, work=work, means=means, journal=journal, done=done).judged()


def _remembered(request: Request, means: Means, job: Job) -> AbstractContextManager[Journal | Parts | None]:
    """What is written down of this check, if anything is."""
    if means.journal is None and not means.parts:
        return nullcontext()
    anchored, told = request.anchored(), f"{means.shard[0]}/{means.shard[1]}" if means.shard else ""
    stamp = fingerprint(anchored, Opened(job.base, job.adapters, job.merged), job.plan)
    head = Head(request=anchored, stamp=stamp, shard=told)
    return closing(Journal(means.journal, head) if means.journal else Parts(means.parts, head))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crew:
    """Whoever does the items: `work`, by an engine. `done` holds the results so far, by the keys of their items."""

    job: Job
    engine: Engine
    work: Callable[[Item], Any]
    means: Means
    journal: Journal | Parts | None
    done: dict[str, Any]

    def judged(self) -> Judged:
        """Every comparison, and what they say together."""
        outcomes, elsewhere, throughput = self.compared()
        chosen = {place: self.job.plan.pairings[place] for place in outcomes}
        refuted = [Refuted(chosen[place], one.refuted) for place, one in outcomes.items() if one.refuted]
        diagnoses = name_all(refuted, self.named)
        comparisons = assign([one.comparison for one in outcomes.values()], diagnoses)
        plan = replace(self.job.plan, pairings=tuple(chosen.values()), elsewhere=elsewhere)
        return comparisons, conclude(plan, comparisons, diagnoses), throughput

    def compared(self) -> tuple[dict[int, Outcome], tuple[str, ...], Throughput | None]:
        """Place of a pairing -> its outcome, in the order of the plan; the tensors that are not all here; the speed."""
        plan = self.job.plan
        every = items(plan)
        mine = shard(plan, every, *self.means.shard) if self.means.shard else every
        self._refuse_gaps(mine)
        throughput = self._compare(mine, "comparing")
        groups: dict[int, list[Item]] = {}
        for one in every:
            groups.setdefault(one.place, []).append(one)
        here = set(map(_key, mine))
        found = {place: self._joined(group) for place, group in groups.items() if here.issuperset(map(_key, group))}
        self._compare([item(plan, place) for place, outcome in found.items() if outcome is None], "looking closer")
        outcomes = {place: outcome or self.done[item(plan, place).key] for place, outcome in found.items()}
        rest = tuple(plan.pairings[place].merged.name for place in groups if place not in found)
        return outcomes, rest, throughput

    def named(self, refuted: Sequence[Refuted], known: Known | None) -> list[Diagnosis | None]:
        """Ask each of these tensors about all mistakes, or about those that are known."""
        plan, told = self.job.plan, known and dict(known)
        places = {one.merged.name: place for place, one in enumerate(plan.pairings)}
        asked = [item(plan, places[one.pairing.merged.name], measure=one.measure, known=told) for one in refuted]
        with self._watched(len(asked), "naming mistakes", "tensor") as advance:
            return self._run(asked, lambda *_: advance(1))

    def _joined(self, group: Sequence[Item]) -> Outcome | None:
        """The outcome of one tensor; None: of its rows, some want a closer look."""
        seen = [self.done[one.key] for one in group]
        return seen[0] if group[0].rows is None else self.job.joined(self.job.plan.pairings[group[0].place], seen)

    def _refuse_gaps(self, mine: Sequence[Item]) -> None:
        absent = [one for one in mine if one.key not in self.done] if self.means.parts else []
        if absent:
            message = f"{len(absent)} of {len(mine)} pieces of work are in none of the journals, such as {absent[0]}"
            given = ", ".join(one["shard"] or "a whole check" for one in heads_of(self.means.parts))
            raise UsageError(message, hint=f"given are {given}: give the journals of all shards, each run to its end")

    def _compare(self, asked: Sequence[Item], deed: str) -> Throughput | None:
        todo = [one for one in asked if one.key not in self.done]
        if not todo:
            return None
        plan, base, merged = self.job.plan, self.job.base, self.job.merged
        sizes = dict(zip(map(_key, todo), sizes_of(plan, todo), strict=True))
        jobs, here = self._jobs(sizes.values()), not self.engine.remote
        workers = min(jobs, cores())
        with (
            self._watched(sum(sizes.values()), deed, "B") as advance,
            metered(plan, todo, base, merged, workers=workers, here=here) as meter,
        ):

            def remember(one: Item, result: Any) -> None:
                """Keep one result, and tell whoever watches."""
                self.done[one.key] = result
                if self.journal:
                    self.journal.add(one, result)
                advance(sizes[one.key])
                meter.done(one)

            self.engine.run(self.work, todo, jobs, remember)
        return meter.throughput

    def _jobs(self, sizes: Collection[int]) -> int:
        """As many workers as were asked for, where more than one is of use."""
        files = [file for one in (self.job.base, self.job.merged) for file in getattr(one, "files", ())]
        waits = self.engine.remote or any(not isinstance(file, Path) or is_plain(file) for file in files)
        small = sum(sizes) < SMALL * len(sizes)
        return 1 if small and not waits else self.means.jobs or cores()

    def _watched(self, total: int, deed: str, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        return self.means.progress(total, deed, unit) if self.means.progress else nullcontext(_silent)

    def _run(self, asked: Sequence[Item], done: Callable[[Item, Any], None]) -> list[Any]:
        return list(self.engine.run(self.work, asked, self.means.jobs or cores(), done))


def _key(one: Item) -> str:
    return one.key


def _silent(*_: Any) -> None:
    """No one watches."""
