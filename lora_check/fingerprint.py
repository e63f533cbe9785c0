"""A digest of everything that the results of a check depend on, but for the bytes of its tensors.

Two processes that find one fingerprint do the same work on the same files: a journal is gone on with, and a worker is
listened to, on that condition only. Instead of the bytes it holds the size and the times of change of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_check.errors import UsageError
from lora_check.inputs import Opened
from lora_check.items import PIECE_BYTES, Request
from lora_check.types import Adapter, Checkpoint, Combination, Pairing, Plan, Recipe
from lora_check.versions import versions

LIBRARIES = ("gguf", "transformers", "scikit-learn", "scipy", "pywavelets")
"""What some plans and some formulas ask beside the libraries that every check rests on."""


def programs() -> dict[str, str]:
    """The version of all that computes, and a digest of this package's own files."""
    return {**versions(), **{name: _installed(name) for name in LIBRARIES}, "code": _code()}


def refuse_other_programs(found: Mapping[str, str], wanted: Mapping[str, str], who: str) -> None:
    """Raise UsageError if somebody computes with other versions, and say which."""
    for name, told in wanted.items():
        if found.get(name) != told:
            hint = "install the same versions everywhere: one report is told of one set of them"
            raise UsageError(f"{who} has {name} {found.get(name)}, not {told}", hint=hint)


def fingerprint(request: Request, opened: Opened, plan: Plan, *, copies: bool = False) -> str:
    """The digest of a request, of what was opened for it, of what it was planned to, and of all that computes.

    copies   a file that was copied with its time of change is the same file
    raises   UsageError: nothing tells whether an input is still what it was
    """
    digest = hashlib.sha256()
    checkpoints = [opened.base, *(file for one in opened.adapters for file in _files_of(one)), opened.merged]
    for told in (
        [programs(), PIECE_BYTES, plain(request)],
        *(_seen(one, copies) for one in checkpoints),
        *(plain(one) for one in opened.adapters),
        *(_of_pairing(one) for one in plan.pairings),
    ):
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """A noun as lists, text and numbers, the same in every process; a function is its name and what it holds."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Recipe | Combination):
        return value.name  # what it does is in this package's files
    if isinstance(value, Mapping):
        return sorted([str(key), plain(one)] for key, one in value.items())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Enum):
        return [type(value).__name__, value.name]
    if is_dataclass(value) and not _is_checkpoint(value):
        return [type(value).__name__, *(plain(getattr(value, one.name)) for one in fields(value))]
    return _of_function(value) if callable(value) else _told(value)


def _told(value: Any) -> str:
    return type(value).__name__ if _is_checkpoint(value) else str(value)


def _of_function(value: Any) -> list[Any]:
    if isinstance(value, partial):
        return [_of_function(value.func), plain(value.args), plain(value.keywords)]
    held = [plain(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()]
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return [name, held, plain(getattr(value, "__defaults__", None))]


def _is_checkpoint(value: Any) -> bool:
    return hasattr(value, "metas") and hasattr(value, "read")


def _files_of(adapter: Adapter) -> Iterator[Checkpoint]:
    """The checkpoints of an adapter: its own, or those of the adapters that it combines."""
    if not adapter.members:
        yield adapter.checkpoint
    for member in adapter.members:
        yield from _files_of(member)


def _seen(checkpoint: Checkpoint, copies: bool) -> list[Any]:
    files = [[_path(file), *_times(file, copies)] for file in getattr(checkpoint, "files", ())]
    if not files:
        message = f"nothing tells whether {checkpoint.location} will still be the same later"
        raise UsageError(message, hint="give the folder or the file that it lies in")
    metas = [(one.name, one.shape, one.dtype, one.stored_as, one.packed) for one in checkpoint.metas().values()]
    return [files, metas, plain(checkpoint.config)]


def _of_pairing(pairing: Pairing) -> list[Any]:
    """Which item this is, and what is done in it; the rest of a pairing follows from the inputs and the programs."""
    steps = [
        [one.recipe.name, one.adapter, sorted(one.factors.items()), one.scale and one.scale.value, one.window]
        for one in pairing.steps
    ]
    base = pairing.base.name if pairing.base else None
    return [pairing.merged.name, base, pairing.module, pairing.undecidable, pairing.wanted, steps]


def _path(file: Any) -> str:
    return os.path.abspath(file) if isinstance(file, Path) else str(file)


def _times(file: Any, copies: bool) -> list[int]:
    found = file.stat()
    own = [] if copies else [getattr(found, "st_ctime_ns", 0)]
    return [found.st_size, found.st_mtime_ns, *own]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@cache
def _code() -> str:
    """A digest of every file of this package."""
    home, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(_sources(home)):
        digest.update(f"{file.relative_to(home)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _sources(home: Path) -> Iterable[Path]:
    return (one for one in home.rglob("*") if one.is_file() and one.suffix not in (".pyc", ".pyo"))
