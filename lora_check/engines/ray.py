"""Workers of ray: those of the cluster that RAY_ADDRESS names, else processes of this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

from lora_check.engines._elsewhere import DEATHS, Answer, LostError, Work, attempt, gathered, strange
from lora_check.errors import UsageError
from lora_check.types import Engine

SECONDS = 10.0
"""How long an address is given to answer."""
UNSET = "unset RAY_ADDRESS for workers of this machine"

_OPEN = ExitStack()
"""What is to be closed after a check: the connection, and the workers that were started for it."""


class _Crowd:
    """The processors of a cluster that are given to tasks, one each."""

    def __init__(self, ray: Any, work: Work) -> None:
        self.ray, self.work = ray, ray.put(work)
        self.task = ray.remote(num_cpus=1, max_retries=DEATHS - 1)(attempt)

    def workers(self) -> int:
        """As many as the cluster has processors."""
        return int(self.ray.cluster_resources().get("CPU", 1))

    def submit(self, work: Work, batch: Sequence[Any]) -> Any:
        """A reference to the answer; the work itself was sent once."""
        return self.task.remote(self.work, batch)

    def finished(self, handles: Sequence[Any]) -> Iterable[Any]:
        """In the order in which they were given away."""
        done: list[Any] = self.ray.wait(handles, num_returns=1)[0]
        return done

    def answer(self, handle: Any) -> Answer:
        """What the reference leads to."""
        from ray import exceptions

        lost = (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError)
        try:
            found: Answer = self.ray.get(handle)
        except lost as error:
            raise LostError(str(error).strip().splitlines()[0]) from error
        except exceptions.RayTaskError as error:
            if not isinstance(error.cause, ImportError | AttributeError) and "failed to import" not in str(error):
                raise
            raise strange("a ray worker", error.cause) from error
        return found


def run(work: Callable[[Any], Any], items: Sequence[Any], jobs: int, done: Callable[[Any, Any], None]) -> list[Any]:
    """Apply `work` to every item on the workers; results come back in the order of the items.

    jobs     processes to start, where RAY_ADDRESS names no cluster
    raises   whatever `work` raised first
             UsageError: ray is not installed, or no cluster answers
             LoraCheckError: workers end whenever they are given a certain item
    """
    return gathered(_Crowd(_connected(jobs), work), work, items, done)


def close() -> None:
    """Leave the cluster, and end the processes that were started."""
    _connected.cache_clear()
    _OPEN.close()


@cache
def _connected(jobs: int) -> Any:
    """ray itself, connected as this process already is, else anew."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("engine ray needs a library", hint="pip install 'lora_check[ray]'") from error
    if ray.is_initialized():
        return ray
    named = os.environ.get("RAY_ADDRESS", "")
    local: dict[str, Any] = {} if named else {"num_cpus": jobs, "include_dashboard": False}
    _refuse_silence(named)
    try:
        ray.init(address=named or "local", log_to_driver=False, logging_level=logging.CRITICAL, **local)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if named:
            raise UsageError(f"the ray cluster at {named} cannot be used: {reason}", hint=UNSET) from error
        raise UsageError(f"ray could not start workers here: {reason}", hint="--engine local needs none") from error
    _OPEN.callback(ray.shutdown)
    return ray


def _refuse_silence(named: str) -> None:
    """Refuse an address where nothing listens: ray itself would go on asking for minutes."""
    host, colon, port = named.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS).close()
    except OSError as error:
        raise UsageError(f"no ray cluster answers at {named}", hint=UNSET) from error


ENGINE = Engine(name="ray", run=run, remote=True, close=close)
