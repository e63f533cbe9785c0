"""Workers of dask: those of the scheduler that its configuration names, else processes of this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pkgutil import resolve_name
from typing import Any

from lora_check.engines._elsewhere import DEATHS, Answer, LostError, Work, attempt, gathered, strange
from lora_check.errors import LoraCheckError, UsageError
from lora_check.types import Engine

_OPEN = ExitStack()
"""What is to be closed after a check: the client and the workers that were started for it."""


class _Crowd:
    """The workers that a client reaches."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def workers(self) -> int:
        """One for each thread."""
        return sum(self.client.nthreads().values())

    def submit(self, work: Work, batch: Sequence[Any]) -> Any:
        """A future; never one of another call that looked alike."""
        return self.client.submit(attempt, work, batch, pure=False)

    def finished(self, handles: Sequence[Any]) -> Iterable[Any]:
        """In the order in which they were given away."""
        from distributed import wait

        done = wait(handles, return_when="FIRST_COMPLETED").done
        return [one for one in handles if one in done]

    def answer(self, handle: Any) -> Answer:
        """What the future holds."""
        from distributed.scheduler import KilledWorker, NoValidWorkerError

        try:
            found: Answer = handle.result()
        except KilledWorker as error:
            raise LostError(f"the last one was {error.last_worker.address}") from error
        except NoValidWorkerError as error:
            raise LoraCheckError("no worker came to the dask scheduler", hint="start some, then check again") from error
        return found


def run(work: Callable[[Any], Any], items: Sequence[Any], jobs: int, done: Callable[[Any, Any], None]) -> list[Any]:
    """Apply `work` to every item on the workers; results come back in the order of the items.

    jobs     processes to start, where the configuration names no scheduler
    raises   whatever `work` raised first
             UsageError: dask is not installed, or no scheduler answers
             LoraCheckError: workers end whenever they are given a certain item, or the scheduler ends
    """
    client = _client(jobs)
    from distributed import CancelledError
    from distributed.comm import CommClosedError

    try:
        return gathered(_Crowd(client), work, items, done)
    except (CancelledError, CommClosedError) as error:
        hint = "see the log of the scheduler; with --journal FILE a check goes on where it stopped"
        raise LoraCheckError("the connection to the dask scheduler was lost", hint=hint) from error


def close() -> None:
    """Leave the scheduler, and end the processes that were started."""
    _client.cache_clear()
    _OPEN.close()


@cache
def _client(jobs: int) -> Any:
    """The client that this process already has, else a new one."""
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError("engine dask needs a library", hint="pip install 'lora_check[dask]'") from error
    try:
        client = Client.current()
    except ValueError:
        client = _connected(jobs)
    _refuse_strangers(client)
    return client


def _connected(jobs: int) -> Any:
    from distributed import Client

    _OPEN.enter_context(_silenced())
    named = _named()
    try:
        return _OPEN.enter_context(Client(**(named or {"address": _local(jobs)})))
    except (OSError, RuntimeError, ValueError) as error:
        close()
        if named:
            message = f"no dask scheduler answers at {', '.join(named.values())}"
            raise UsageError(message, hint="unset DASK_SCHEDULER_ADDRESS for workers of this machine") from error
        raise UsageError(f"dask could not start workers here: {error}", hint="--engine local needs none") from error


def _refuse_strangers(client: Any) -> None:
    """Refuse workers of other versions: what a worker cannot load would end it, and then the next one."""
    from lora_check.fingerprint import programs, refuse_other_programs

    for address, found in client.run(resolve_name, f"{programs.__module__}:programs", on_error="return").items():
        if isinstance(found, ImportError | AttributeError):
            raise strange(f"the dask worker at {address}", found)
    for address, found in client.run(programs, on_error="ignore").items():
        refuse_other_programs(found, programs(), f"the dask worker at {address}")


def _named() -> dict[str, str]:
    """Where dask's configuration says that the scheduler is; empty if it names none."""
    import dask

    told = {
        "address": dask.config.get("scheduler-address", None),
        "scheduler_file": dask.config.get("scheduler-file", None),
    }
    return {key: str(value) for key, value in told.items() if value}


def _local(jobs: int) -> Any:
    """Processes of this machine, one thread each; one that ends is replaced.

    Dask counts what is mapped from a file as memory of a worker, so its limits would end workers that need little.
    """
    import dask
    from distributed import LocalCluster

    quiet = {"dashboard_address": "localhost:0", "silence_logs": logging.CRITICAL}
    with dask.config.set({"distributed.scheduler.allowed-failures": DEATHS - 1}):
        cluster = LocalCluster(n_workers=jobs, threads_per_worker=1, processes=True, memory_limit=0, **quiet)
    return _OPEN.enter_context(cluster)


@contextmanager
def _silenced() -> Iterator[None]:
    """What dask has to say of its workers is told as an error, or is no matter of the one who asked."""
    known = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("distributed", "tornado")]
    before = {name: logging.getLogger(name).level for name in known}
    for name in known:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


ENGINE = Engine(name="dask", run=run, remote=True, close=close)
