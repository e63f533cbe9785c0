"""The middle of the line: every item compared, then the refuted tensors named, by one engine, into one journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_check import registry
from lora_check.diagnose import Known
from lora_check.distributed import perform
from lora_check.errors import UsageError
from lora_check.findings import Diagnosis, assign, conclude
from lora_check.inputs import Opened
from lora_check.items import Item, Request, items, shard, sizes_of
from lora_check.journal import Head, Journal, Parts, stamp
from lora_check.means import Means, cores
from lora_check.naming import name_all
from lora_check.types import Comparison, Finding
from lora_check.work import Job, Outcome, Refuted


def judged(
    request: Request, means: Means, job: Job, journal: Journal | Parts | None
) -> tuple[tuple[Comparison, ...], tuple[Finding, ...]]:
    """Compare every item, name the mistakes in the tensors that are refuted, and pool what was seen."""
    done = dict(journal.done) if journal else {}
    crew = _Crew(job=job, request=request, means=means, journal=journal, done=done)
    outcomes, elsewhere = crew.compared()
    chosen = {place: job.plan.pairings[place] for place in outcomes}
    refuted = [Refuted(chosen[place], one.refuted) for place, one in outcomes.items() if one.refuted]
    diagnoses = name_all(refuted, crew.named)
    comparisons = assign([one.comparison for one in outcomes.values()], diagnoses)
    plan = replace(job.plan, pairings=tuple(chosen.values()), elsewhere=elsewhere)
    return comparisons, conclude(plan, comparisons, diagnoses)


@contextmanager
def remembered(request: Request, means: Means, opened: Opened) -> Iterator[Journal | Parts | None]:
    """What is written down of this check, if anything is."""
    if means.journal is None and not means.parts:
        yield None
        return
    told = f"{means.shard[0]}/{means.shard[1]}" if means.shard else ""
    head = Head(request=request, stamp=stamp(request, *opened), shard=told)
    with closing(Journal(means.journal, head) if means.journal else Parts(means.parts, head)) as found:
        yield found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crew:
    """Whoever does the items; `done` holds the results so far, by the keys of their items."""

    job: Job
    request: Request
    means: Means
    journal: Journal | Parts | None
    done: dict[str, Any]

    def compared(self) -> tuple[dict[int, Outcome], tuple[str, ...]]:
        """Place of a pairing -> its outcome, in the order of the plan; and the tensors that are not all here."""
        plan = self.job.plan
        every = items(plan)
        mine = shard(plan, every, *self.means.shard) if self.means.shard else every
        self._refuse_gaps(mine)
        self._compare(mine)
        groups: dict[int, list[Item]] = {}
        for item in every:
            groups.setdefault(item.place, []).append(item)
        here = {item.key for item in mine}
        found = {place: self._joined(group) for place, group in groups.items() if here.issuperset(map(_key, group))}
        self._compare([Item(place=place) for place, outcome in found.items() if outcome is None])
        outcomes = {place: outcome or self.done[Item(place=place).key] for place, outcome in found.items()}
        return outcomes, tuple(plan.pairings[place].merged.name for place in groups if place not in found)

    def named(self, refuted: Sequence[Refuted], known: Known | None) -> list[Diagnosis | None]:
        """Ask each of these tensors about all mistakes, or about those that are known."""
        places = {one.merged.name: place for place, one in enumerate(self.job.plan.pairings)}
        told = known and dict(known)
        asked = [Item(place=places[one.pairing.merged.name], measure=one.measure, known=told) for one in refuted]
        return self._run(asked, _silent)

    def _joined(self, group: Sequence[Item]) -> Outcome | None:
        """The outcome of one tensor; None: of its rows, some want a closer look."""
        seen = [self.done[item.key] for item in group]
        return seen[0] if group[0].rows is None else self.job.joined(self.job.plan.pairings[group[0].place], seen)

    def _refuse_gaps(self, mine: Sequence[Item]) -> None:
        absent = [item for item in mine if item.key not in self.done] if self.means.parts else []
        if absent:
            name = self.job.plan.pairings[absent[0].place].merged.name
            message = f"{len(absent)} of {len(mine)} pieces of work are in none of the journals, one of them of {name}"
            raise UsageError(message, hint="give the journals of all shards, and let each shard finish first")

    def _compare(self, asked: Sequence[Item]) -> None:
        todo = [item for item in asked if item.key not in self.done]
        sizes = dict(zip(map(_key, todo), sizes_of(self.job.plan, todo), strict=True))
        with self.means.progress(sum(sizes.values())) if self.means.progress else nullcontext(_silent) as advance:

            def remember(item: Item, result: Any) -> None:
                """Keep one result, and tell whoever watches."""
                self.done[item.key] = result
                if self.journal:
                    self.journal.add(item, result)
                advance(sizes[item.key])

            self._run(todo, remember)

    def _run(self, asked: Sequence[Item], done: Callable[[Item, Any], None]) -> list[Any]:
        engine = registry.load("engines")[self.means.engine]
        work = partial(perform, self.request.anchored()) if engine.remote else self.job.perform
        return list(engine.run(work, asked, jobs=self.means.jobs or cores(), done=done))


def _key(item: Item) -> str:
    return item.key


def _silent(*_: Any) -> None:
    """No one watches."""
