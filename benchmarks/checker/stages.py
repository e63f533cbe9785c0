"""Where lora_check's own time goes: stages by subtraction of whole runs, rooms by a profile.

A stage is the difference between the CPU seconds of two command lines of which one does that much more. Nothing inside
the package is touched or timed, so the figures hold whatever its rooms are called.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from benchmarks.checker.measure import measured, warm
from benchmarks.checker.nouns import Case, Run, Settings, python

BYSTANDERS = ("*norm*", "*embed_tokens*", "*lm_head*")
ONE = "model.norm.weight"
CODES = (0, 1, 3)
"""What `report` exits with when it has a verdict."""
WIDTH = 2
"""Bytes of an element: every model here is bf16."""


class BrokenProfileError(RuntimeError):
    """A run that the profile needs has failed."""


@dataclass(frozen=True, slots=True)
class Level:
    """A command line: the least CPU seconds of its runs, and how far their middle is from there."""

    least: float
    apart: float


def profile(case: Case, settings: Settings, repeats: int) -> dict[str, Any]:
    """Stages in CPU seconds with what they read, and the rooms of a profiled run; or the reason why there are none."""
    warm(case.weights)
    try:
        return {"stages": stages(case, settings, repeats), "rooms": rooms(case, settings), "reason": ""}
    except BrokenProfileError as error:
        return {"stages": [], "rooms": [], "reason": str(error)}


def stages(case: Case, settings: Settings, repeats: int) -> list[dict[str, Any]]:
    """Differences between command lines of which each does more than the one before it."""
    report = ("-m", "lora_check", "report", case.base, case.adapter, case.merged, "--jobs", 1, "--format", "json")
    bystanders = [part for glob in BYSTANDERS for part in ("--include", glob)]
    commands = {
        "Python": python("-c", "pass"),
        "importing torch and safetensors": python("-c", "import torch, safetensors.torch"),
        "what else every report does: our modules, headers, the plan": python(*report, "--include", ONE),
        "bystanders": python(*report, *bystanders),
        "targets": python(*report),
    }
    runs = {name: [finished(command, settings) for _ in range(repeats)] for name, command in commands.items()}
    read = bytes_read(runs["targets"][0])
    levels = {name: level([run.cpu for run in found]) for name, found in runs.items()}
    before = [Level(0, 0), *levels.values()]
    return [
        {
            "stage": name,
            "cpu": one.least - last.least,
            "apart": one.apart + last.apart,
            "merged_bytes": read.get(name, 0),
        }
        for (name, one), last in zip(levels.items(), before, strict=False)
    ]


def level(seconds: Sequence[float]) -> Level:
    """The least of several runs, which has least of what disturbs, and the distance of their median."""
    return Level(min(seconds), statistics.median(seconds) - min(seconds))


def finished(command: Sequence[str], settings: Settings) -> Run:
    """A run that must have ended well; `inconclusive`, which a part of a model is, counts."""
    run = measured(command, settings, CODES)
    if run.failed:
        raise BrokenProfileError(run.failed)
    return run


def bytes_read(run: Run) -> dict[str, int]:
    """Merged bytes of targets and of bystanders, by a report."""
    found = {"targets": 0, "bystanders": 0}
    for tensor in json.loads(run.stdout)["tensors"]:
        found["targets" if tensor["kind"] == "target" else "bystanders"] += WIDTH * prod(tensor["shape"])
    return found


def rooms(case: Case, settings: Settings) -> list[dict[str, Any]]:
    """Seconds by file of the package, in a process that is profiled."""
    run = finished(python("-m", "benchmarks.checker.rooms", case.base, case.adapter, case.merged), settings)
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found
