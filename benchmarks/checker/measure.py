"""One command -> a Run: wall and CPU seconds, private memory, bytes from a device.

CPU seconds are those of wait4: the process and all children that it waited for. Private memory is resident memory that
belongs to no file (psutil's rss - shared), summed over the process tree, sampled every 10 ms; what a process maps from
a file is the page cache's and not counted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from benchmarks.checker.nouns import Run, Settings, environment

EVERY = 0.01
"""Seconds between two samples."""
FAMILY = 10
"""Samples between two looks for new children."""
SECTOR = 512
"""Bytes of one block as rusage counts them."""
LINES, TAIL = 2, 300
"""Lines and characters kept of what a failing arm wrote last."""


def measured(command: Sequence[str], settings: Settings, codes: Sequence[int] = (0,)) -> Run:
    """Run a command to its end, or until it is over a limit.

    codes   exit codes that are an answer; any other makes the run a failed one
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        process = subprocess.Popen(  # noqa: S603
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(),
            start_new_session=True,
        )
        watch = Watch(process.pid, settings)
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            end(process.pid)
            raise
        finally:
            wall = time.monotonic() - began
            watch.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        return Run(
            wall=wall,
            user=usage.ru_utime,
            system=usage.ru_stime,
            private=watch.private,
            from_disk=usage.ru_inblock * SECTOR,
            code=process.returncode,
            stdout=text(out),
            failed=watch.over or reason(process.returncode, codes, text(err)),
        )


def reason(code: int, codes: Sequence[int], wrote: str) -> str:
    """Why a run is no result; empty if it is one."""
    if code in codes:
        return ""
    last = "; ".join(wrote.strip().split("\n")[-LINES:])[-TAIL:]
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {last}" if last else how


def text(file: IO[bytes]) -> str:
    """All that was written to a file."""
    file.seek(0)
    return file.read().decode(errors="replace")


def end(pid: int) -> None:
    """End a process that leads its own group, and the group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class Watch(threading.Thread):
    """Samples the private memory of a process tree and ends it when it is over a limit."""

    def __init__(self, pid: int, settings: Settings) -> None:
        super().__init__(daemon=True)
        self.pid, self.settings, self.root = pid, settings, psutil.Process(pid)
        self.private, self.over = 0, ""
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        began, family, sample = time.monotonic(), [self.root], 0
        while not self._stopped.wait(EVERY):
            if sample % FAMILY == 0:
                family = tree(self.root)
            sample += 1
            self.private = max(self.private, sum(map(private, family)))
            if self.private > self.settings.memory:
                self.over = f"over the limit of {self.settings.memory / 1e9:.1f} GB of private memory"
            elif time.monotonic() - began > self.settings.seconds:
                self.over = f"over the limit of {self.settings.seconds:g} seconds"
            if self.over:
                end(self.pid)
                return

    def stop(self) -> None:
        """No more samples."""
        self._stopped.set()
        self.join()


def tree(root: psutil.Process) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return [root]


def private(process: psutil.Process) -> int:
    """Resident bytes that belong to no file; 0 when the process has ended."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return max(0, memory.rss - memory.shared)


# -------------------------------------------------------------------------------------------------- the page cache


def warm(files: Sequence[Path]) -> None:
    """Read files once, so that the next who reads them finds them in memory."""
    buffer = bytearray(1 << 23)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def cool(files: Sequence[Path]) -> None:
    """Ask the kernel to forget files; what is mapped or not yet written stays, so they are written first."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
