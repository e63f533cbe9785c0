"""What a remote place is asked: what is there, how large it is, some of its bytes. Patiently, and never for long.

A request that fails is tried again after a pause. What was answered of a file once must hold for every later answer:
of a file that changes meanwhile nothing is told.
"""

from __future__ import annotations

import os
import re
import time
from asyncio import TimeoutError as AsyncTimeoutError
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from ctypes import CDLL
from dataclasses import dataclass
from functools import cache
from threading import Event
from typing import Any, Protocol, TypeVar

from lora_check.errors import InputError, LoraCheckError, NotFoundError

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before a request is made again."""
PATIENCE = 120.0
"""Seconds after which a request that fails is not made again."""
ASKING, READING = 60.0, 120.0
"""Seconds that one request may take: for a name or a size; for a block of bytes."""
IN_FLIGHT = 8
"""Requests at a time."""
SPENT = 1 << 24
"""Bytes that are read before the allocator is asked to give back what is free: it would keep some tens of MiB."""

FORBIDDEN = (401, 403, 407)
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers of HTTP that may be others a moment later."""

FINAL = ("NoCredentialsError", "PartialCredentialsError", "OfflineModeIsEnabled")
"""Errors of botocore and of the hub's library that another try meets again."""
MISTAKES = (TypeError, AttributeError, NameError, AssertionError)
"""What no store says: errors of a program."""
LATER = "check the connection, or download the checkpoint and give its folder"
NO_ACCESS = "credentials are taken from the environment, as the library for this kind of store takes them"

Done = TypeVar("Done")
Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """What a store says of a path.

    stamp    what tells one version of the file from another: name of a validator -> its value
    folder   it is one
    whole    why only the whole file can be had, if so
    """

    size: int
    stamp: tuple[tuple[str, str], ...] = ()
    folder: bool = False
    whole: str = ""

    def contradicts(self, other: Stat) -> bool:
        """Whether these two cannot be of one version; what only one of them tells proves nothing."""
        mine, theirs = dict(self.stamp), dict(other.stamp)
        return self.size != other.size or any(mine[key] != theirs[key] for key in mine.keys() & theirs.keys())


class ChangedError(Exception):
    """The file is not the one that was asked about before."""


class RefusedError(Exception):
    """An answer that another try would not mend."""


class Backend(Protocol):
    """One kind of store.

    Every method raises FileNotFoundError, PermissionError or RefusedError; after any other error it is asked again.

    stat    of a path
    names   the files of a folder; None: this kind of store does not list them
    read    fills the buffer with the bytes from `start` on; ChangedError: they are not of the version that was seen
    """

    def stat(self, path: str) -> Stat: ...

    def names(self, path: str) -> tuple[str, ...] | None: ...

    def read(self, path: str, start: int, into: memoryview, seen: Stat) -> None: ...


class Store:
    """A backend, asked patiently; what it says of names and sizes is asked once. Safe to use from several threads.

    name     of the kind of store: with the path it tells one file from another
    opening  a text that no other opening has
    """

    def __init__(self, name: str, backend: Backend) -> None:
        self.name, self.opening, self._backend = name, os.urandom(16).hex(), backend
        self._spent = 0
        self._stats: dict[str, Stat | None] = {}
        self._names: dict[str, tuple[str, ...] | None] = {}
        self._hidden: dict[str, bool] = {}

    def stat(self, path: str, shown: str) -> Stat | None:
        """What is said of a path; None: nothing is there.

        raises   InputError: no access, or no answer
        """
        if path not in self._stats:
            self._stats[path] = self._stat(path, shown)
        return self._stats[path]

    def names(self, path: str, shown: str) -> tuple[str, ...] | None:
        """The files of a folder; None where the store does not list them."""
        if path not in self._names:
            self._names[path] = self._listed(path, shown)
        return self._names[path]

    def read(
        self, path: str, shown: str, start: int, into: memoryview, what: str = "", given_up: Event | None = None
    ) -> None:
        """Fill the buffer with the bytes of a file from `start` on.

        what      whose bytes they are: "tensor 'x'"
        given_up  nobody waits for them any more, if it is set
        raises    InputError naming file, tensor and bytes
        """
        seen = self.stat(path, shown)
        whose = f"{what} of {shown}" if what else shown
        if seen is None:
            raise NotFoundError(f"nothing lies at {shown}", hint="check the spelling, and that you have access")
        if not len(into):
            return
        asked = f"{whose}, bytes {start} to {start + len(into) - 1},"
        try:
            patiently(lambda: self._backend.read(path, start, into, seen), asked, given_up)
        except PermissionError as error:
            raise no_access(asked, error) from None
        except (ChangedError, FileNotFoundError):
            hint = "check again when nobody writes to it"
            raise InputError(f"{whose} was changed while it was read", hint=hint) from None
        self._give_back(len(into))

    def _give_back(self, read: int) -> None:
        self._spent += read
        if self._spent > SPENT:
            self._spent = 0
            _trim()(0)

    def _stat(self, path: str, shown: str) -> Stat | None:
        try:
            return patiently(lambda: self._backend.stat(path), shown)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            if self._hides(path.rpartition("/")[0], shown):
                return None
            raise no_access(shown, error) from None

    def _listed(self, path: str, shown: str) -> tuple[str, ...] | None:
        try:
            return patiently(lambda: self._backend.names(path), shown)
        except FileNotFoundError:
            return ()
        except PermissionError:
            return None

    def _hides(self, folder: str, shown: str) -> bool:
        """Whether access is refused to what is not there, too, as stores do that let nobody list them."""
        if folder not in self._hidden:
            absent = f"{folder}/absent-{os.urandom(8).hex()}"
            try:
                patiently(lambda: self._backend.stat(absent), shown)
                self._hidden[folder] = False
            except FileNotFoundError:
                self._hidden[folder] = False
            except PermissionError:
                self._hidden[folder] = True
        return self._hidden[folder]


@cache
def _trim() -> Callable[[int], Any]:
    """What has the allocator of glibc give back what is free; of others nothing is asked."""
    try:
        found: Callable[[int], Any] = CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return int
    return found


def patiently(deed: Callable[[], Done], asked: str, given_up: Event | None = None) -> Done:
    """Do it, again after a pause if it fails, unless it is given up.

    raises   FileNotFoundError, PermissionError, ChangedError; InputError: an answer that is no use, or none in time
    """
    given_up, began, tries = given_up or Event(), time.monotonic(), 0
    while True:
        tries += 1
        try:
            return deed()
        except (LoraCheckError, FileNotFoundError, PermissionError, ChangedError, ImportError, *MISTAKES):
            raise
        except Exception as error:  # noqa: BLE001 - every library of a store has errors of its own
            if _has_access_refused(error):
                raise PermissionError(said(error)) from None
            last = _is_final(error) or tries > len(PAUSES) or time.monotonic() - began > PATIENCE
            if last or given_up.wait(PAUSES[tries - 1]):
                times = f" after {tries} tries" if tries > 1 else ""
                hint = NO_ACCESS if "Credentials" in type(error).__name__ else LATER
                raise InputError(f"{asked} cannot be read{times}: {said(error)}", hint=hint) from None


def _status(error: Exception) -> int:
    """The HTTP status that a library's error carries; 0: none."""
    found = getattr(getattr(error, "response", None), "status_code", 0)
    return found if isinstance(found, int) else 0


def _has_access_refused(error: Exception) -> bool:
    return _status(error) in FORBIDDEN


def _is_final(error: Exception) -> bool:
    """Whether another try would be answered alike."""
    told = type(error).__name__ in FINAL
    wrong = 400 <= _status(error) < 500 and _status(error) not in PASSING
    return told or wrong or isinstance(error, (RefusedError, ValueError))


def no_access(asked: str, error: Exception) -> InputError:
    """The error of what may not be read."""
    return InputError(f"{asked} cannot be read: access is refused: {said(error)}", hint=NO_ACCESS)


def said(error: Exception) -> str:
    """A library's message in one short line, without what may be secret in an address."""
    if isinstance(error, (TimeoutError, FutureTimeoutError, AsyncTimeoutError)):
        return "no answer in time"
    text = re.sub(r"(?<=[\w/])\?[^\s'\")]+", "", " ".join(str(error).split()))
    return re.sub(r"(?<=://)[^/@\s'\"]+@", "", text)[:200] or type(error).__name__


def all_of(function: Callable[[Asked], Done], asked: Iterable[Asked]) -> Iterator[Done]:
    """Ask for several things at once; the answers in the order of the questions."""
    return pool().map(function, asked)


def pool() -> ThreadPoolExecutor:
    """The threads that wait for answers; what they do must not wait for them."""
    return _pool(os.getpid())


@cache
def _pool(_: Any) -> ThreadPoolExecutor:
    """One of each process: threads do not survive a fork."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="lora_check-remote")
