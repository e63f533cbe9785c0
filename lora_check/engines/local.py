"""Threads of this process, one tensor each at a time. torch releases the interpreter lock in every kernel used here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lora_check.types import Engine


def run(work: Callable[[Any], Any], items: Sequence[Any], jobs: int, done: Callable[[Any], None]) -> list[Any]:
    """Apply `work` to every item on `jobs` threads; results come back in the order of the items.

    raises   whatever `work` raised first; what has not begun by then is never begun
    """
    results = []
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        try:
            for result in pool.map(work, items):
                done(result)
                results.append(result)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


ENGINE = Engine(name="local", run=run)
