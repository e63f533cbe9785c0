"""By which means a check is carried out: workers, engine, journal, shard. None of them changes what it finds."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from lora_check import registry
from lora_check.errors import UsageError
from lora_check.items import Request
from lora_check.reading.plain import How
from lora_check.remote.place import shown_as

Advance = Callable[[int], None]


class Progress(Protocol):
    """(total, what is being done, unit) -> a bar; it is told how many of the total are done as they come."""

    def __call__(self, total: int, deed: str = ..., unit: str = ..., /) -> AbstractContextManager[Advance]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """How the work is done.

    journal  a file that finished items are written to, and taken from
    shard    (number, count): only these items
    parts    journals of all shards: every item has to be in one of them
    lasting  the engine stays open after this check: whoever asked has more of them, and closes it
    read     whether files are mapped or read plainly
    """

    jobs: int | None = None
    engine: str = "local"
    journal: str | None = None
    shard: tuple[int, int] | None = None
    parts: tuple[str, ...] = ()
    progress: Progress | None = None
    lasting: bool = False
    read: How = "auto"


def refuse_what_cannot_be(request: Request, means: Means) -> None:
    """Raise UsageError for means that do not go with each other or with the inputs."""
    if means.jobs is not None and means.jobs < 1:
        raise UsageError(f"{means.jobs} jobs cannot do anything", hint="give one or more, or leave it out")
    if means.shard and not 1 <= means.shard[0] <= means.shard[1]:
        number, count = means.shard
        raise UsageError(f"there is no shard {number} of {count}", hint="count from 1: --shard 1/4 to --shard 4/4")
    if means.shard and not means.journal:
        raise UsageError("a shard is of use to merge-reports only", hint="give it a --journal FILE of its own")
    secret = next((one for one in _locations(request) if shown_as(one) != one), None) if means.journal else None
    if secret is not None:
        message = f"a journal would hold what the URL {shown_as(secret)} was given with"
        raise UsageError(message, hint="let the environment hold the credentials, where the libraries look for them")
    files = all(isinstance(one, str | os.PathLike) for one in (request.base, *request.adapters, request.merged))
    if not files and (means.journal or registry.load("engines")[means.engine].remote):
        what = "a journal" if means.journal else f"engine {means.engine}"
        raise UsageError(f"{what} needs locations, not tensors in memory", hint="save the model, and give its folder")


def _locations(request: Request) -> list[str]:
    given = (request.base, *request.adapters, request.merged)
    return [one for one in given if isinstance(one, str)]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
