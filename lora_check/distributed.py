"""One piece of a check in a process of its own: it opens and plans the same inputs, once, and keeps them open."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from lora_check.inputs import opened_inputs
from lora_check.items import Item, Request
from lora_check.plan import make_plan
from lora_check.work import Job, job, one_thread


def perform(request: Request, item: Item) -> Any:
    """What `Job.perform` gives, wherever this runs.

    raises   InputError: a location means nothing to this process, or what lies there cannot be read
    """
    return _job(request).perform(item)


@lru_cache(maxsize=1)
def _job(request: Request) -> Job:
    stack = ExitStack()
    atexit.register(stack.close)
    opened = stack.enter_context(
        opened_inputs(request.base, request.adapters, request.merged, request.weights, request.combination)
    )
    stack.enter_context(one_thread())
    return job(*opened, make_plan(*opened, include=request.include, exclude=request.exclude))
