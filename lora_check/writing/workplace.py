"""Where a folder is made before anyone sees it: a hidden sibling, finished files only, then one renaming.

Every file is written under another name, brought to the disk and renamed; a small state file says which shards are
done, and for which inputs. A killed run leaves the hidden folder, and the next one of the same inputs goes on there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_check.errors import UsageError

STATE = ".merge-state.json"
UNFINISHED = ".part"
FLAGS = os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """The hidden folder of one run.

    fingerprint   of inputs and options: what was done for another one is of no use
    done          finished file -> its size
    """

    folder: Path
    out: Path
    fingerprint: str
    done: dict[str, int] = field(default_factory=dict)

    def has(self, name: str, size: int) -> bool:
        """Whether an earlier run has finished this file."""
        path = self.folder / name
        return self.done.get(name) == size and path.is_file() and path.stat().st_size == size

    @contextmanager
    def file(self, name: str, size: int) -> Iterator[int]:
        """A descriptor of a new file of that size; it has its name once all of it is on the disk."""
        part = self.folder / f"{name}{UNFINISHED}"
        descriptor = os.open(part, FLAGS, 0o666)
        try:
            os.ftruncate(descriptor, size)
            yield descriptor
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            part.unlink()
            raise
        os.close(descriptor)
        part.replace(self.folder / name)

    def keep(self, name: str, size: int) -> None:
        """Remember a finished file for a run after this one."""
        self.done[name] = size
        self.write(STATE, _as_json({"fingerprint": self.fingerprint, "done": self.done}))
        _sync(self.folder)

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole."""
        with self.file(name, len(data)) as descriptor:
            write_all(descriptor, data, 0)

    def publish(self) -> None:
        """Give the folder its name, where all that is in it is on the disk."""
        for path in self.folder.iterdir():
            if path.name.endswith(UNFINISHED):
                path.unlink()
        _sync(self.folder)
        self.folder.rename(self.out)
        (self.out / STATE).unlink(missing_ok=True)
        _sync(self.out)
        _sync(self.out.parent)


def destination(out: str | os.PathLike[str]) -> Path:
    """Where the folder is to lie.

    raises   UsageError: something lies there, or it has no folder to lie in
    """
    path = Path(os.path.abspath(Path(out).expanduser()))
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        what = "is a file" if path.is_file() else "holds files already"
        raise UsageError(f"OUT {path} {what}, and nothing is replaced", hint="name a folder that is not there yet")
    if not path.parent.is_dir():
        raise UsageError(
            f"OUT {path} cannot be written: there is no folder {path.parent}", hint="make that folder first"
        )
    return path


@contextmanager
def workplace(out: Path, fingerprint: str) -> Iterator[Workplace]:
    """The hidden folder beside OUT, with what an earlier run of the same fingerprint finished.

    What is not finished is taken away when this run ends, and the folder too where nothing was.

    raises   UsageError: another run works there, or the folder is not one of ours
    """
    folder = out.parent / f".{out.name}{UNFINISHED}"
    with _told(out):
        folder.mkdir(exist_ok=True)
    with _alone(folder, out):
        place = Workplace(folder=folder, out=out, fingerprint=fingerprint, done=_done(folder, fingerprint))
        try:
            place.write(STATE, _as_json({"fingerprint": fingerprint, "done": place.done}))
            yield place
        finally:
            _leave(place)


def demand_space(out: Path, needed: int) -> None:
    """Refuse before anything is written what the disk has no room for."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        from tqdm import tqdm

        more, there = (tqdm.format_sizeof(size, "B") for size in (needed, free))
        raise UsageError(
            f"OUT {out} takes {more} more, and {out.parent} has {there} free",
            hint="make room, or name a folder on another disk",
        )


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write every byte at an offset; the system may take fewer at a time."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """What the system says when it refuses to write, as a sentence."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"OUT {out} cannot be written: {reason}", hint="name a folder that can be written") from error


@contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    """One run at a time: the system lets go of the lock when a run is killed."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait for it, or name another OUT"
            raise UsageError(f"another merge into {out} is under way", hint=hint) from None
        yield
    finally:
        os.close(descriptor)


def _done(folder: Path, fingerprint: str) -> dict[str, int]:
    """What is finished for this fingerprint; of another one, everything is removed."""
    present = sorted(path for path in folder.iterdir() if not path.name.endswith(UNFINISHED))
    state = _state(folder)
    if state is None and present:
        raise UsageError(f"{folder} is in the way: no merge left it there", hint="move it away")
    if state and state["fingerprint"] == fingerprint:
        return dict(state["done"])
    for path in folder.iterdir():
        path.unlink()
    return {}


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError):
        return None
    told = isinstance(state, dict) and isinstance(state.get("fingerprint"), str) and isinstance(state.get("done"), dict)
    return state if told else None


def _leave(place: Workplace) -> None:
    """Take away what is not finished; nothing is left of a run that finished nothing, or everything."""
    if not place.folder.is_dir():
        return
    with suppress(OSError):
        kept = {*place.done, STATE} if place.done else set()
        for path in place.folder.iterdir():
            if path.name not in kept:
                path.unlink()
        if not place.done:
            place.folder.rmdir()


def _as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
