"""Threads of this process, one item each at a time. torch releases the interpreter lock in every kernel used here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from lora_check.types import Engine


def run(work: Callable[[Any], Any], items: Sequence[Any], jobs: int, done: Callable[[Any, Any], None]) -> list[Any]:
    """Apply `work` to every item on `jobs` threads; results come back in the order of the items.

    raises   whatever `work` raised first; what has not begun by then is never begun
    """
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        try:
            futures = {pool.submit(work, item): place for place, item in enumerate(items)}
            results: list[Any] = [None] * len(items)
            for future in as_completed(futures):
                place = futures[future]
                results[place] = future.result()
                done(items[place], results[place])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


ENGINE = Engine(name="local", run=run)
