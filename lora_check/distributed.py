"""One piece of a check in a process of its own: it opens and plans the same inputs, once, and keeps them open.

What it answers counts only if it is the same check: the same programs, the same files, the same plan.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import torch

from lora_check.errors import InputError, LoraCheckError
from lora_check.fingerprint import fingerprint, programs, refuse_other_programs
from lora_check.inputs import Opened, opened_inputs
from lora_check.items import Item, Request
from lora_check.plan import make_plan
from lora_check.reading.plain import How, chosen, reading
from lora_check.types import Arithmetic
from lora_check.work import Job, job

SAME_FILES = "every worker needs the same files under the same paths: use shared storage, or copy them with their times"


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A check, as another process has to know it.

    request      its locations mean the same wherever they are opened
    programs     what computes, with versions          seal   the fingerprint of the inputs and their plan
    hints        which arithmetic is tried first, as in `Job`
    read         how files are read, as in `Means`
    """

    request: Request
    programs: tuple[tuple[str, str], ...]
    seal: str
    hints: tuple[tuple[tuple[str, str], Arithmetic], ...]
    read: How = "auto"


class _Held(NamedTuple):
    """Opened inputs, closed when nobody holds them any more."""

    job: Job
    stack: ExitStack


_OPENING = Lock()


def errand(request: Request, here: Job) -> Errand:
    """What another process needs to do pieces of this job."""
    anchored = request.anchored()
    return Errand(
        request=anchored,
        programs=tuple(programs().items()),
        seal=fingerprint(anchored, Opened(here.base, here.adapters, here.merged), here.plan, copies=True),
        hints=tuple(here.hints.items()),
        read=chosen(),
    )


def perform(asked: Errand, item: Item) -> Any:
    """What `Job.perform` gives, wherever this runs.

    raises   UsageError: other programs run here
             InputError: the files cannot be seen from here, or are others
    """
    with _OPENING:
        held = _held(asked)
    return held.job.perform(item)


@lru_cache(maxsize=2)
def _held(asked: Errand) -> _Held:
    refuse_other_programs(programs(), dict(asked.programs), _here())
    torch.set_num_threads(1)  # a parallel region inside the tile loop stalls on shared cores
    request, stack = asked.request, ExitStack()
    try:
        given = request.base, request.adapters, request.merged, request.weights, request.combination
        with reading(asked.read):
            opened = stack.enter_context(opened_inputs(*given))
        plan = make_plan(*opened, include=request.include, exclude=request.exclude)
        seal = fingerprint(request, opened, plan, copies=True)
    except LoraCheckError as error:
        raise type(error)(f"{_here()}: {error.message}", hint=SAME_FILES) from error
    if seal != asked.seal:
        raise InputError(f"{_here()}: other files lie at these locations, or changed files", hint=SAME_FILES)
    return _Held(job(*opened, plan, dict(asked.hints), asked.request.device), stack)


def _here() -> str:
    return f"a worker on {socket.gethostname()}"
