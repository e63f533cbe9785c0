"""Files that are read, not mapped: a mapping over a network asks for a page at a time, and a file that shrinks under it
ends the process. Here rows come in large reads, and whatever goes wrong is told.

Source: https://man7.org/linux/man-pages/man5/proc_pid_mounts.5.html
"""

from __future__ import annotations

import os
import re
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, get_args

from lora_check.errors import CorruptCheckpointError, InputError, UsageError
from lora_check.reading.stamps import HINT, changed, stamp
from lora_check.sources import Lines

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Buffer = np.ndarray[Any, np.dtype[np.uint8]]

How = Literal["auto", "map", "plain"]
HOWS: tuple[How, ...] = get_args(How)
"""auto: plainly where a file lies on a network mount, else mapped."""

NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|fuse|fuse\..+|lustre|gpfs|beegfs|ceph|afs|pvfs2|orangefs|panfs|wekafs|glusterfs|vboxsf"
)
"""Kinds of file systems over which a mapping is slow or unsafe; `fuseblk` is a disk."""

MOUNTS = Path("/proc/self/mounts")
LARGE = 1 << 22
"""Bytes of one read of rows, at least: 4 MiB, many times what a network brings in one round trip."""

MOST = 1 << 30
"""Bytes of one read at most; the system call stops at 2 GiB."""

_how: ContextVar[How] = ContextVar("how", default="auto")


@contextmanager
def reading(how: How) -> Iterator[None]:
    """Open files this way while the body runs."""
    token = _how.set(how)
    try:
        yield
    finally:
        _how.reset(token)


def chosen() -> How:
    """How files are opened now."""
    return _how.get()


def is_plain(path: Path) -> bool:
    """Whether this file is to be read plainly."""
    how = _how.get()
    if how == "plain" and not hasattr(os, "preadv"):
        raise UsageError("this system has no plain reads at an offset", hint="leave --read out")
    return how == "plain" or (how == "auto" and NETWORK.fullmatch(kind_of(path)) is not None)


def kind_of(path: Path, mounts: Path = MOUNTS) -> str:
    """The kind of file system that a file lies on, by the longest mount point above it; '' where nothing tells."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place, longest, kind = os.path.realpath(path), "", ""
    for _, point, each, *_ in (line.split(" ") for line in lines if line.count(" ") >= 2):
        above = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        # Of two mounts on one point the later hides the earlier.
        if len(above) >= len(longest) and f"{place}/".startswith(f"{above.rstrip('/')}/"):
            longest, kind = above, each
    return kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A tensor in its file: the bytes, and what torch makes of them."""

    name: str
    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def columns(self) -> int:
        """Of a line; of a vector, each element is one."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def count(self) -> int:
        """How many lines there are."""
        return prod(self.shape) // max(1, self.columns)

    def lines(self, start: int, stop: int) -> Stretch:
        """Some of its lines, as a matrix."""
        line = self.length // max(1, self.count)
        return Stretch(
            name=self.name,
            offset=self.offset + start * line,
            length=(stop - start) * line,
            shape=(stop - start, self.columns),
            dtype=self.dtype,
        )


class PlainFile:
    """A file of which tensors are read, whole or by rows; safe to use from several threads.

    close   () -> lets go of the file, as whoever forgets this object does; tensors that were read stay valid
    """

    def __init__(self, path: Path, stretches: Iterable[Stretch]) -> None:
        try:
            self._file = FileIO(path)
        except OSError as error:
            raise _failed(path, error) from error
        self.close = weakref.finalize(self, self._file.close)
        self._path, self._stretches = path, {one.name: one for one in stretches}
        self._stamp = stamp(self._file.fileno())

    def get_tensor(self, name: str) -> Tensor:
        """The tensor, read at once.

        raises   InputError: the file does not give it, or changed since it was opened
                 AttributeError: torch has no such dtype
        """
        import numpy as np

        stretch = self._stretches[name]
        return self.read(stretch, np.empty(stretch.length, dtype=np.uint8))

    def rows(self, name: str) -> Lines | None:
        """The tensor, of which lines are read when they are asked for; None of one that a single read brings.

        raises   AttributeError: torch has no such dtype
        """
        import torch

        stretch = self._stretches[name]
        if stretch.length <= LARGE:
            return None
        return Lines(shape=stretch.shape, dtype=getattr(torch, stretch.dtype), make=_Lines(self, stretch).read)

    def read(self, stretch: Stretch, buffer: Buffer) -> Tensor:
        """The numbers of a stretch, in the first bytes of a buffer."""
        import torch

        dtype, raw = getattr(torch, stretch.dtype), buffer[: stretch.length]
        if not stretch.length:
            return torch.empty(stretch.shape, dtype=dtype)
        self._fill(raw.data, stretch)
        tensor: Tensor = torch.from_numpy(raw).view(dtype).reshape(stretch.shape)
        return tensor

    def _fill(self, buffer: memoryview, stretch: Stretch) -> None:
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._file.fileno(), [buffer[done : done + MOST]], stretch.offset + done)
                if not count:
                    break
                done += count
            now = stamp(self._file.fileno())
        except OSError as error:
            raise _failed(self._path, error, stretch.name) from error
        if now != self._stamp:
            raise changed(self._path, self._stamp, now)
        if done < len(buffer):
            raise _short(self._path, stretch.name, stretch.offset + done)


class _Lines:
    """A tensor as a matrix of which lines are read, some MiB at a time; safe to use from several threads."""

    def __init__(self, file: PlainFile, stretch: Stretch) -> None:
        import numpy as np

        self._file, self._stretch, self._lock = file, stretch, Lock()
        self._buffer: Buffer = np.empty(0, dtype=np.uint8)
        self._unused = sys.getrefcount(self._buffer)  # each tensor that lies in the buffer is one more
        self._first, self._held = 0, file.read(stretch.lines(0, 0), self._buffer)

    def read(self, span: slice) -> Tensor:
        """These lines, in memory that no later read changes.

        raises   InputError: the file does not give them, or changed since it was opened
        """
        with self._lock:
            if span.start < self._first or span.stop > self._first + len(self._held):
                wanted = self._stretch.lines(span.start, self._last(span))
                self._held = self._held[:0].clone()
                self._first, self._held = span.start, self._file.read(wanted, self._room(wanted.length))
            return self._held[span.start - self._first : span.stop - self._first]

    def _room(self, length: int) -> Buffer:
        """The buffer of before, if no tensor refers to it any more: fresh memory costs more than reading into it."""
        import numpy as np

        if len(self._buffer) < length or sys.getrefcount(self._buffer) > self._unused:
            self._buffer = np.empty(length, dtype=np.uint8)
        return self._buffer

    def _last(self, span: slice) -> int:
        """Where to stop reading: a large read, and no line past the tensor."""
        line = max(1, self._stretch.length // self._stretch.count)
        return int(min(self._stretch.count, max(span.stop, span.start + LARGE // line)))


def _failed(path: Path, error: OSError, name: str = "") -> InputError:
    what = f"tensor {name!r} of {path}" if name else str(path)
    reason = (error.strerror or type(error).__name__).lower()
    return InputError(f"{what} cannot be read: {reason}", hint="see whether the disk or the mount it lies on is well")


def _short(path: Path, name: str, end: int) -> InputError:
    message = f"tensor {name!r} of {path} cannot be read: the file ends at byte {end}, in the middle of it"
    return CorruptCheckpointError(message, hint=HINT)
