"""Whether files stayed as they were: a verdict about a file that was written to meanwhile is about no file at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lora_check.errors import InputError
from lora_check.types import Checkpoint

HINT = "wait until nothing writes to it any more, and check again"


class Stamp(NamedTuple):
    """What tells one content of a file from another without reading it."""

    size: int
    changed: int
    inode: int


def stamp(file: Path | int) -> Stamp:
    """The stamp of a file, by its path or by its descriptor."""
    found = os.stat(file)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


def stamps(*checkpoints: Checkpoint) -> dict[Path, Stamp]:
    """Every local file that these checkpoints lie in, as it is now; each read of a remote one looks for itself."""
    files = [file for one in checkpoints for file in getattr(one, "files", ()) if isinstance(file, Path)]
    return {file: stamp(file) for file in files if file.is_file()}


def refuse_changed(before: Mapping[Path, Stamp]) -> None:
    """Refuse files that are not what they were.

    raises   InputError: the first of them, and what became of it
    """
    for file, then in before.items():
        try:
            now = stamp(file)
        except OSError as error:
            raise InputError(f"{file} went away while it was being checked", hint=HINT) from error
        if now != then:
            raise changed(file, then, now)


def changed(file: Path, then: Stamp, now: Stamp) -> InputError:
    """What became of a file."""
    if now.inode != then.inode:
        deed = "was replaced"
    elif now.size != then.size:
        deed = f"changed from {then.size} to {now.size} bytes"
    else:
        deed = "was written to"
    return InputError(f"{file} {deed} while it was being checked", hint=HINT)
