"""What engines of other processes share: few pieces of work in flight, and none of them lost without a word."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from lora_check.errors import LoraCheckError, UsageError

IN_FLIGHT = 4
"""Batches that each worker is given in advance, so that none waits for the one that hands them out."""
LARGEST, SMALLEST_SHARE = 16, 64
"""Items in one batch, at most; and batches for each worker, at least: the last of them end at about the same time."""
DEATHS = 3
"""Workers that may end over one item before it is taken to be what ends them."""

SAME = "install the same version everywhere"

Work = Callable[[Any], Any]
Done = Callable[[Any, Any], None]
Handle = TypeVar("Handle")


class Answer(NamedTuple):
    """The results of the first items of a batch, all of them unless an error came."""

    results: list[Any]
    error: LoraCheckError | None


class LostError(Exception):
    """The workers that had a batch ended before they answered."""


class Crowd(Protocol[Handle]):
    """Workers elsewhere.

    workers   how many there are now
    submit    give them a batch
    finished  wait until one of these is done, and give all that are
    answer    of one that is done; raises LostError
    """

    def workers(self) -> int: ...
    def submit(self, work: Work, batch: Sequence[Any]) -> Handle: ...
    def finished(self, handles: Sequence[Handle]) -> Iterable[Handle]: ...
    def answer(self, handle: Handle) -> Answer: ...


def attempt(work: Work, batch: Sequence[Any]) -> Answer:
    """Do the items of a batch, in a worker: an error in words is an answer, which no log shows."""
    results: list[Any] = []
    try:
        for item in batch:
            results.append(work(item))  # noqa: PERF401
    except LoraCheckError as error:
        return Answer(results, error)
    return Answer(results, None)


def strange(worker: str, reason: object) -> UsageError:
    """A worker that does not know this package, or another version of it."""
    told = str(reason).strip().rpartition("\n")[2]
    return UsageError(f"{worker} cannot load this version of lora_check: {told}", hint=SAME)


def gathered(crowd: Crowd[Any], work: Work, items: Sequence[Any], done: Done) -> list[Any]:
    """Apply `work` to every item by a crowd; results come back in the order of the items.

    raises   LoraCheckError: what an item raised, or that it ended one worker after the other
    """
    return _Gathering(crowd=crowd, work=work, items=items, done=done).run()


@dataclass(slots=True, kw_only=True)
class _Gathering(Generic[Handle]):
    """What is still to be done, what is in flight, and what came back; all by the places of the items.

    suspects   were in a batch whose workers ended: each is done alone, when nothing else is in flight
    alone      have been done so, or are
    """

    crowd: Crowd[Handle]
    work: Work
    items: Sequence[Any]
    done: Done
    results: list[Any] = field(init=False)
    todo: deque[range] = field(init=False)
    suspects: deque[range] = field(default_factory=deque)
    alone: set[range] = field(default_factory=set)
    flying: dict[Handle, range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.results = [None] * len(self.items)
        size = max(1, min(LARGEST, len(self.items) // (SMALLEST_SHARE * max(1, self.crowd.workers()))))
        every = range(len(self.items))
        self.todo = deque(every[start : start + size] for start in every[::size])

    def run(self) -> list[Any]:
        """Until everything is done."""
        while self.todo or self.flying or self.suspects:
            self._send()
            for handle in self.crowd.finished(list(self.flying)):
                self._take(handle, self.flying.pop(handle))
        return self.results

    def _send(self) -> None:
        room = IN_FLIGHT * max(1, self.crowd.workers())
        while self.todo and len(self.flying) < room:
            self._submit(self.todo.popleft())
        if not self.flying:
            self.alone.add(self.suspects[0])
            self._submit(self.suspects.popleft())

    def _submit(self, places: range) -> None:
        self.flying[self.crowd.submit(self.work, [self.items[place] for place in places])] = places

    def _take(self, handle: Handle, places: range) -> None:
        try:
            results, error = self.crowd.answer(handle)
        except LostError as lost:
            self._suspect(places, lost)
            return
        for place, result in zip(places, results, strict=False):
            self.results[place] = result
            self.done(self.items[place], result)
        if error:
            raise error

    def _suspect(self, places: range, lost: LostError) -> None:
        """Try the items of a lost batch one by one; of one that was alone, say so."""
        if places in self.alone:
            message = f"every worker that was given {self.items[places[0]]} ended before it answered: {lost}"
            raise LoraCheckError(message, hint="mostly memory: give each worker more, or see the logs of the workers")
        self.suspects.extend(places[index : index + 1] for index in range(len(places)))
