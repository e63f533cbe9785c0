"""Comparing all bytes of base and merged, without stopping at the first difference.

`python -m benchmarks.checker.arms.compare BASE ADAPTER MERGED`
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from benchmarks.checker.arms import _answers as answers
from benchmarks.checker.nouns import Arm, Case, Settings, python

BLOCK = 1 << 20


def main(base: str, _: str, merged: str) -> None:
    """Read both in blocks and give each pair to memcmp."""
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    one, other = (ctypes.create_string_buffer(BLOCK) for _ in range(2))
    compared = differing = 0
    for theirs in sorted(Path(merged).glob("*.safetensors")):
        with (Path(base) / theirs.name).open("rb", buffering=0) as before, theirs.open("rb", buffering=0) as after:
            while size := after.readinto(one):
                same = before.readinto(other) == size and memcmp(one, other, size) == 0
                compared, differing = compared + 1, differing + (not same)
    answers.tell(differing, compared)


def command(case: Case, _: Settings) -> list[str]:
    """This file on three folders."""
    return python("-m", "benchmarks.checker.arms.compare", case.base, case.adapter, case.merged)


ARM = Arm(
    name="cmp",
    about="`memcmp` of all blocks of base and merged, not stopping at the first difference; knows nothing of merges",
    place=7,
    command=command,
    said=answers.read,
)

if __name__ == "__main__":
    main(*sys.argv[1:])
