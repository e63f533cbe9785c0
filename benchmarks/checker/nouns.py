"""Frozen nouns of the benchmark. Nothing here imports torch: the process that measures stays small."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

HONEST = ("right", "rounded")
"""The two merges that are right: the sum rounded once, and the delta rounded before it is added (safe_merge)."""
BROKEN = ("skipped", "scaled")
"""The two that are not: one layer left out, and one tensor whose delta is a little too large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama by its sizes, and the adapter on all seven projections of every layer; `real` is a model of fixtures.

    shards   files of the base and of the merged checkpoint
    """

    name: str
    about: str
    hidden: int = 0
    layers: int = 0
    mlp: int = 0
    heads: int = 0
    kv_heads: int = 0
    vocabulary: int = 0
    tied: bool = False
    shards: int = 1
    rank: int = 16
    alpha: int = 32
    real: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model on disk. `variants` are merged checkpoints that differ from `merged` in how they were made."""

    folder: Path
    merged: Path

    @property
    def base(self) -> Path:
        """The folder of the base checkpoint."""
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        return self.folder / "adapter"

    @property
    def weights(self) -> list[Path]:
        """Every weight file that a judge has to read."""
        return [file for part in (self.base, self.adapter, self.merged) for file in sorted(part.glob("*.safetensors"))]

    @property
    def pair(self) -> list[Path]:
        """The weight files of base and merged."""
        return [file for part in (self.base, self.merged) for file in sorted(part.glob("*.safetensors"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line settles for every run.

    seconds   one run may last that long
    memory    private bytes that one run may hold
    mergekit  the interpreter of an environment that has mergekit
    """

    seconds: float
    memory: int
    mergekit: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process from its start to its end.

    wall             seconds
    user, system     CPU seconds of the process and of all it started and waited for
    private          the largest sum of private (anonymous) bytes over the process tree that a sample saw
    from_disk        bytes that the kernel read from a device for it
    failed           why there is no result, else empty
    """

    wall: float
    user: float
    system: float
    private: int
    from_disk: int
    code: int
    stdout: str
    failed: str = ""

    @property
    def cpu(self) -> float:
        """CPU seconds."""
        return self.user + self.system


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What an arm answers: `right`, `wrong`, `undecided`, or `none` for one that cannot judge; and what it named."""

    answer: str
    named: str = ""


def no_answer(_: Run) -> Said:
    """For arms that judge nothing."""
    return Said(answer="none")


def nothing_missing(_: Settings) -> str:
    """For arms that need only what this benchmark needs."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to judge a merge: a command line, and how to read its answer.

    about    half a sentence for the page
    place    where it stands in tables
    missing  why it cannot run here, else empty
    codes    exit codes that come with an answer; all others are failures
    timed    False: it only judges the controls
    judges   False: it has nothing to say of them, or nothing of its own
    """

    name: str
    about: str
    place: int
    command: Callable[[Case, Settings], list[str]]
    said: Callable[[Run], Said] = no_answer
    missing: Callable[[Settings], str] = nothing_missing
    codes: tuple[int, ...] = (0,)
    timed: bool = True
    judges: bool = True


def environment() -> dict[str, str]:
    """What every process of the benchmark runs in: one intra-op thread, nothing fetched, this tree in front."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONSTARTUP", "PYTHONPROFILEIMPORTTIME")
    }
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**kept, **one, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def python(*arguments: Any, interpreter: Path | str = sys.executable) -> list[str]:
    """A command line that runs this interpreter, or another."""
    return [str(interpreter), *map(str, arguments)]
