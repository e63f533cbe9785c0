"""Make files that lie: headers, offsets, indexes and pickles that contradict themselves or want to run code."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 123\n"
"""What lies in a clone without git-lfs, in place of the weights."""


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One line of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_safetensors(path: Path, header: Mapping[str, Any] | bytes, data: int) -> Path:
    """Write any header, true or not, before `data` zero bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    return path


def _line(name: str, begin: int, end: int, size: int = 2) -> str:
    return f'"{name}":{json.dumps(tensor("F32", [size], begin, end))}'


HEADERS: Mapping[str, tuple[Mapping[str, Any] | bytes, int, str]] = {
    "the same line twice": (f"{{{_line('w', 0, 8)},{_line('w', 0, 8)}}}".encode(), 8, "'w' twice"),
    "one name for two tensors": (f"{{{_line('w', 0, 8)},{_line('w', 8, 16)}}}".encode(), 16, "'w' twice"),
    "a shape twice": (b'{"w":{"dtype":"F32","shape":[2],"shape":[3],"data_offsets":[0,8]}}', 8, "'shape' twice"),
    "overlap": ({"w": tensor("F32", [2], 0, 8), "v": tensor("F32", [2], 4, 12)}, 12, "'v' overlap 'w'"),
    "one place for two tensors": ({"w": tensor("F32", [2], 0, 8), "v": tensor("F32", [2], 0, 8)}, 8, "overlap"),
    "a gap": ({"w": tensor("F32", [2], 0, 8), "v": tensor("F32", [2], 12, 20)}, 20, "gap at data byte 8"),
    "unused bytes": ({"w": tensor("F32", [2], 0, 8)}, 12, "last 4 bytes"),
    "beyond the end": ({"w": tensor("F32", [2], 0, 8)}, 4, "'w' end at data byte 8"),
    "end before begin": ({"w": tensor("F32", [2], 8, 0)}, 8, "'w' end at byte 0"),
    "a narrower dtype": ({"w": tensor("F16", [2], 0, 8)}, 8, "'w' 8 bytes; F16 [2] takes 4"),
    "a wider dtype": ({"w": tensor("F64", [2], 0, 8)}, 8, "'w' 8 bytes; F64 [2] takes 16"),
    "a larger shape": ({"w": tensor("F32", [2**40, 2**40], 0, 8)}, 8, "'w' 8 bytes"),
    "a negative shape": ({"w": tensor("F32", [-2], 0, 8)}, 8, "'w'"),
    "a fractional shape": ({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 8, "'w'"),
    "three offsets": ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8, "'w'"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, 8, "'w'"),
    "a number for a tensor": ({"w": 3}, 0, "'w'"),
    "metadata of numbers": ({"__metadata__": {"rank": 8}}, 0, "__metadata__"),
    "a list": (b"[1, 2]", 0, "not a JSON object but a list"),
    "no JSON": (b'{"w": }', 0, "line 1 column 7"),
    "no text": (b'{"\xff": 1}', 0, "not JSON"),
    "endless nesting": (b"[" * 100_000, 0, "not JSON"),
}
"""Header -> bytes of data, and what the message must say."""

STARTS: Mapping[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes long"),
    "five bytes": (b"hello", "5 bytes long"),
    "a header longer than the file": (struct.pack("<Q", 100) + b"{}", "would end at byte 108"),
    "text": (b"hello, this is no checkpoint", "this is no safetensors file"),
    "a git-lfs pointer": (POINTER.encode(), "git-lfs pointer"),
}
"""First bytes of a file -> what the message must say."""


def damages(raw: bytes, count: int, *, seed: int) -> Iterator[bytes]:
    """Copies of a file with one to four bytes changed, lost or added near its beginning."""
    draw = random.Random(seed)
    for _ in range(count):
        copy = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(min(len(copy), 1000))
            copy[place : place + draw.choice((0, 1, 1))] = draw.randbytes(draw.choice((0, 1, 1)))
        yield bytes(copy)


class RunsCode:
    """Pickle as a call of os.system that leaves a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.sentinel}'",)


def torch_zip(path: Path, content: object) -> None:
    """Save as torch does since 1.6."""
    torch.save(content, path)


def torch_legacy(path: Path, content: object) -> None:
    """Save as torch did before 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain(protocol: int) -> Callable[[Path, object], None]:
    """Save with pickle alone."""

    def save(path: Path, content: object) -> None:
        path.write_bytes(pickle.dumps(content, protocol=protocol))

    return save


PICKLERS: Mapping[str, Callable[[Path, object], None]] = {
    "zip": torch_zip,
    "legacy": torch_legacy,
    **{f"protocol {number}": plain(number) for number in (0, 2, 4, 5)},
}


def shard(
    folder: Path, kind: str, parts: list[dict[str, torch.Tensor]], listed: Mapping[str, str] | None = None
) -> Path:
    """Write shards of kind 'model.safetensors' or 'pytorch_model.bin' and an index; the path of the index.

    listed   the weight_map, where it is not the true one
    """
    stem, suffix = kind.split(".")
    true: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(part, folder / name)
        true |= dict.fromkeys(part, name)
    index = folder / f"{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": true if listed is None else listed}))
    return index
