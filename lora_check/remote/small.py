"""Small tensors, such as the factors of an adapter, are asked for again and again: fetched once, and kept a while."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALL, KEPT = 1 << 22, 1 << 23
"""Bytes of one tensor, and of all that a checkpoint keeps."""


class Small:
    """The small tensors that were read lately; each is fetched once, however many ask for it at a time."""

    def __init__(self) -> None:
        self._lock, self._held = Lock(), dict[str, Future["Tensor"]]()

    def get(self, name: str, fetch: Callable[[], Tensor]) -> Tensor:
        """A copy of the tensor of that name."""
        with self._lock:
            known = self._held.pop(name, None)
            promise = self._held[name] = known or Future()
        if known is None:
            self._fetch(name, promise, fetch)
        found = promise.result()
        self._evict()
        return found.clone()

    def _fetch(self, name: str, promise: Future[Tensor], fetch: Callable[[], Tensor]) -> None:
        try:
            promise.set_result(fetch())
        except BaseException as error:
            promise.set_exception(error)
            with self._lock:
                self._held.pop(name, None)
            raise

    def _evict(self) -> None:
        """Let go of what was asked for longest ago."""
        with self._lock:
            here = {name: one.result().nbytes for name, one in self._held.items() if one.done() and not one.exception()}
            size = sum(here.values())
            for name, nbytes in here.items():
                if size <= KEPT:
                    break
                del self._held[name]
                size -= nbytes
