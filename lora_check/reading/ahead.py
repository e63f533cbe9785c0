"""Cold files: what the check is about to touch is asked of the disk a little before, several blocks at once.

A mapping asks for one page after another, and waits for each. Here a few threads ask the kernel for whole blocks
(posix_fadvise WILLNEED) and wait until they are there, never more than a window ahead of the compute, so that the
mapping finds them in memory. Nothing is copied. What is in memory already is only looked at, and what the compute has
passed is left out. Where the system has no such calls, nothing is read ahead.

Nothing here can fail the check: what could not be read ahead is read when it is touched, and told then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EOPNOTSUPP
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Condition, Thread

from lora_check.reading.ranges import Range

WINDOW = 1 << 28
"""Bytes that may lie read and not yet used: 256 MiB, a few tensors of each worker, little beside any page cache."""

THREADS = 4
"""Readers. One leaves gaps between its blocks; more than a few only split what the device gives."""

ASKED = 1 << 17
"""Bytes of one request: the least that Linux is set to read ahead (128 KiB), beyond which it may drop the rest."""

PROBED = 1 << 22
"""A byte of every so many, and the last, tell whether a block is in memory."""

AT_ONCE = 2e-5
"""Seconds that a byte in memory takes at most, where a file system cannot say; a device takes longer. A wrong guess
costs a request, or the gain, and no more."""

SUPPORTED = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """What had to come from a device: bytes, seconds in which a reader waited for it, CPU seconds of the readers."""

    size: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Ahead:
    """The readers of one pass; `advance` tells them how many bytes of the ranges the compute has finished."""

    def __init__(self, blocks: Iterable[Range], window: int, threads: int) -> None:
        self._blocks, self._window = iter(blocks), window
        self._turn = Condition()
        self._given = self._done = self._waiting = self._size = 0
        self._since = self._seconds = self._cpu = 0.0
        self._stopped = False
        self._files: dict[Path, FileIO] = {}
        self._hopeless: set[Path] = set()
        self._threads = [Thread(target=self._work, name=f"read-ahead-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def cold(self) -> Cold:
        """What came from a device so far; the CPU seconds of readers that have ended."""
        with self._turn:
            return Cold(size=self._size, seconds=self._seconds, cpu_seconds=self._cpu)

    def advance(self, count: int) -> None:
        """The compute has finished so many bytes more."""
        with self._turn:
            self._done += count
            self._turn.notify_all()

    def close(self) -> None:
        """End the readers, each within one request."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            file.close()

    def _work(self) -> None:
        while (block := self._next()) is not None:
            with suppress(OSError, ValueError):
                self._bring(block)
        with self._turn:
            self._cpu += time.thread_time()

    def _next(self) -> Range | None:
        """The next block that the compute has not passed, once it is within the window; None at the end."""
        with self._turn:
            for block in self._blocks:
                self._given = end = self._given + block.length
                self._turn.wait_for(partial(self._due, end, max(self._window, block.length)))
                if self._stopped:
                    return None
                if end > self._done and block.path not in self._hopeless:
                    return block
        return None

    def _due(self, end: int, window: int) -> bool:
        return self._stopped or end - self._done <= window

    def _bring(self, block: Range) -> None:
        """Have the block in memory; a file of which nothing stays there is not asked again."""
        file = self._file(block.path).fileno()
        if _in_memory(file, block):
            return
        with self._waited(block.length):
            self._ask(file, block)
            if not _in_memory(file, block):
                self._read(file, block)
                if not self._stopped and not _in_memory(file, block):
                    self._hopeless.add(block.path)

    def _ask(self, file: int, block: Range) -> None:
        """Request everything, then wait for the last byte of every request."""
        for start, length in _requests(block):
            if not self._stopped:
                os.posix_fadvise(file, start, length, os.POSIX_FADV_WILLNEED)
        for start, length in _requests(block):
            if not self._stopped:
                os.preadv(file, [bytearray(1)], start + length - 1)

    def _read(self, file: int, block: Range) -> None:
        """The same for a file system that takes no requests."""
        buffer = memoryview(bytearray(ASKED))
        for start, length in _requests(block):
            if not self._stopped:
                os.preadv(file, [buffer[:length]], start)

    @contextmanager
    def _waited(self, size: int) -> Iterator[None]:
        """Count the time in which any reader waits, once."""
        with self._turn:
            self._since = self._since if self._waiting else time.monotonic()
            self._waiting += 1
        try:
            yield
        finally:
            with self._turn:
                self._waiting -= 1
                self._size += size
                now = time.monotonic()
                self._seconds, self._since = self._seconds + now - self._since, now

    def _file(self, path: Path) -> FileIO:
        with self._turn:
            if path not in self._files:
                self._files[path] = file = FileIO(path)
                # The kernel is to read what is asked for, not what may come next: that is our affair, and counted.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            return self._files[path]


@contextmanager
def read_ahead(ranges: Iterable[Range], *, window: int = WINDOW, threads: int = THREADS) -> Iterator[Ahead]:
    """Read these ranges ahead, in their order, while the body runs.

    window   bytes that may be ahead of what `advance` has told
    """
    ahead = Ahead(ranges, window, threads if SUPPORTED else 0)
    try:
        yield ahead
    finally:
        ahead.close()


def _requests(block: Range) -> Iterator[tuple[int, int]]:
    end = block.offset + block.length
    return ((start, min(ASKED, end - start)) for start in range(block.offset, end, ASKED))


def _probes(block: Range) -> Iterator[int]:
    end = block.offset + block.length
    yield from range(block.offset, end, PROBED)
    yield end - 1


def _in_memory(file: int, block: Range) -> bool:
    """Whether most of some bytes can be had at once: of a few pages that it has, those that tell it to read on, the
    kernel says no.
    """
    found = [_at_once(file, offset) for offset in _probes(block)]
    return 2 * sum(found) > len(found)


def _at_once(file: int, offset: int) -> bool:
    """Whether this byte can be had without waiting for a device."""
    one = [bytearray(1)]
    try:
        return os.preadv(file, one, offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != EOPNOTSUPP:
            raise
    began = time.perf_counter()
    os.preadv(file, one, offset)
    return time.perf_counter() - began < AT_ONCE
