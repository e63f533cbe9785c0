"""What formats on disk share: JSON that says where it is wrong, config.json, indexes, git-lfs pointers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from lora_check.errors import CorruptCheckpointError, InputError, NotFoundError, UsageError, WrongInputError

INDEX = ".index.json"
POINTER = b"version https://git-lfs.github.com/spec"
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
"""model-00001-of-00003.gguf: one of the parts that a file was split into, counted from 1."""

DAMAGED = "download or write the file again; its size and checksum tell whether it is complete"
MIXED = "the shards of two checkpoints may lie in one folder"

Held = TypeVar("Held")


def one_line(error: BaseException) -> str:
    """Fold a library's message into one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_head(path: Path, count: int) -> bytes:
    """Read the first bytes of a weight file; a git-lfs pointer is refused.

    raises   InputError: unreadable; CorruptCheckpointError: a pointer instead of the weights
    """
    try:
        with path.open("rb") as file:
            head = file.read(max(count, len(POINTER)))
    except OSError as error:
        raise unreadable(path, error) from error
    return _no_pointer(path, head)[:count]


def unreadable(path: Path, error: OSError) -> InputError:
    """Say why the operating system does not give the file."""
    return InputError(f"{path} cannot be read: {(error.strerror or one_line(error)).lower()}")


def parse_object(raw: bytes, what: str, error: type[InputError]) -> dict[str, Any]:
    """Parse a JSON object in which no key occurs twice.

    what     names the text in every message, such as 'header of model.safetensors'
    error    the class to raise
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object of these pairs, unless a key is among them twice."""
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{what} names {repeated!r} twice", hint=DAMAGED)
        return found

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as cause:
        where = f"line {cause.lineno} column {cause.colno}"
        raise error(f"{what} is not JSON: {cause.msg.lower()} at {where}", hint=DAMAGED) from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} is not JSON: {one_line(cause)}", hint=DAMAGED) from cause
    if not isinstance(parsed, dict):
        raise error(f"{what} is not a JSON object but a {type(parsed).__name__}", hint=DAMAGED)
    return parsed


def read_object(path: Path, error: type[InputError] = CorruptCheckpointError) -> dict[str, Any]:
    """Read a JSON file that holds one object."""
    try:
        raw = path.read_bytes()
    except OSError as cause:
        raise unreadable(path, cause) from cause
    return parse_object(_no_pointer(path, raw), str(path), error)


def read_config(folder: Path) -> Mapping[str, Any]:
    """Read the config.json of a model folder; an absent one is an empty mapping."""
    path = folder / "config.json"
    return MappingProxyType(read_object(path) if path.is_file() else {})


def read_index(path: Path) -> dict[str, Path]:
    """Read which shard holds each tensor.

    raises   CorruptCheckpointError: no weight_map, a tensor named twice, or a shard that is not there
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CorruptCheckpointError(f"index {path} has no weight_map", hint=DAMAGED)
    shards: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            message = f"index {path} gives tensor {name!r} the shard {shard!r}, which is no file name"
            raise CorruptCheckpointError(message, hint=DAMAGED)
        shards[name] = path.parent / shard
    for file in dict.fromkeys(shards.values()):
        if not file.is_file():
            message = f"index {path} names shard {file.name}, which is not there"
            raise CorruptCheckpointError(message, hint=f"copy or download {file.name} into {path.parent}")
    return shards


def absent_shards(folder: Path) -> bool:
    """Whether an index of this folder names a shard that is not there."""
    for path in folder.glob(f"*{INDEX}"):
        weight_map = read_object(path).get("weight_map")
        shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else ()
        if not all((folder / shard).is_file() for shard in shards):
            return True
    return False


def first_part(folder: Path, pattern: str) -> Path:
    """The one file of a folder that a pattern finds, or the first of its parts.

    raises   WrongInputError: the files are not one checkpoint
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob(pattern)):
        part = PART.fullmatch(path.name)
        found.setdefault((part["stem"], part["count"]) if part else (path.name, ""), path)
    if len(found) > 1:
        shown = ", ".join([path.name for path in found.values()][:3])
        message = f"{folder} holds {len(found)} checkpoints: {shown}"
        raise WrongInputError(message, hint="give the one file that is meant, or move the others away")
    return next(iter(found.values()))


def all_parts(path: Path) -> tuple[Path, ...]:
    """All parts of the checkpoint that a file is one of, as its name counts them; a file of another name is alone.

    raises   CorruptCheckpointError: a part that is not there
    """
    part = PART.fullmatch(path.name)
    if part is None:
        return (path,)
    count = int(part["count"])
    names = [f"{part['stem']}-{number + 1:05d}-of-{count:05d}{part['suffix']}" for number in range(count)]
    absent = next((name for name in names if not (path.parent / name).is_file()), None)
    if absent is not None or path.name not in names:
        problem = f"{absent} is not there" if absent else "none of them has this number"
        message = f"{path} is one of {count} parts, and {problem}"
        raise CorruptCheckpointError(message, hint="copy or download all parts into one folder")
    return tuple(path.parent / name for name in names)


def whole_set(folder: Path, paths: Sequence[Path]) -> None:
    """Check that the numbered files among these are the parts of one checkpoint, and that none is absent.

    raises   WrongInputError: of two checkpoints; CorruptCheckpointError: a part that is not there
    """
    parts = {path: part for path in paths if (part := PART.fullmatch(path.name))}
    sets = {(part["stem"], part["count"]): path for path, part in parts.items()}
    for stem in {stem for stem, _ in sets}:
        counts = sorted(count for other, count in sets if other == stem)
        if len(counts) > 1:
            shown = " and ".join(f"{stem}-*-of-{count}" for count in counts)
            message = f"{folder} holds shards of {len(counts)} checkpoints, {shown}, and no index says which is meant"
            raise WrongInputError(message, hint="move the stale shards out of the folder, or bring the index back")
    for path in sets.values():
        all_parts(path)


def counted(folder: Path, name: str) -> tuple[Path, ...]:
    """The files of a folder that are counted from 00 in two digits, `name` with a {} for them.

    raises   CorruptCheckpointError: a number is left out before the last
    """
    found = sorted(path.name for path in folder.glob(name.format("[0-9][0-9]")))
    expected = [name.format(f"{number:02d}") for number in range(len(found))]
    for absent in expected:
        if absent not in found:
            message = f"{folder} holds {found[-1]}, and {absent} is not there"
            raise CorruptCheckpointError(message, hint="copy or download all parts into one folder")
    return tuple(folder / one for one in expected)


def match_index(path: Path, index: Mapping[str, Path], homes: Mapping[str, Path]) -> None:
    """Check that the index and its shards name the same tensors in the same files.

    index    tensor -> the shard that the index gives
    homes    tensor -> the shard that holds it
    """
    for name, shard in index.items():
        if homes.get(name) != shard:
            message = f"index {path} says that tensor {name!r} lies in {shard.name}, which does not hold it"
            raise CorruptCheckpointError(message, hint=MIXED)
    for name, shard in homes.items():
        if name not in index:
            message = f"index {path} does not list tensor {name!r}, which {shard.name} holds"
            raise CorruptCheckpointError(message, hint=MIXED)


def join(parts: Mapping[Path, Mapping[str, Held]]) -> dict[str, tuple[Path, Held]]:
    """Put the tensors of several files under one roof: name -> (file, what that file holds).

    raises   CorruptCheckpointError: two files hold a tensor of the same name
    """
    joined: dict[str, tuple[Path, Held]] = {}
    for path, tensors in parts.items():
        for name, held in tensors.items():
            if name in joined:
                message = f"tensor {name!r} lies in both {joined[name][0]} and {path.name}"
                raise CorruptCheckpointError(message, hint="name the one file that is meant")
            joined[name] = (path, held)
    return joined


def absent_tensor(name: str, location: str, *, closed: bool) -> InputError | UsageError:
    """Say why a tensor of this name cannot be read."""
    if closed:
        return UsageError(f"tensor {name!r} was asked of {location}, which is closed")
    return NotFoundError(f"{location} holds no tensor {name!r}")


def _no_pointer(path: Path, head: bytes) -> bytes:
    if head.startswith(POINTER):
        message = f"{path} is a git-lfs pointer, not the file itself"
        raise CorruptCheckpointError(message, hint="run `git lfs pull`")
    return head
