"""One size: its model on disk, and its entry in the results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.checker.measure import measured
from benchmarks.checker.nouns import Arm, Case, Settings, Shape, python
from benchmarks.checker.rotation import Tell, rotated
from benchmarks.checker.shapes import bytes_of

COPIES, CONTROLS, AGAIN = 2, 3, 2
"""Models on disk at once: base and merged; the controls; and what merging again writes."""


class UnmadeModelError(RuntimeError):
    """A model that cannot be made here."""


def make(shape: Shape, case: Case, settings: Settings, *, controls: bool, again: bool) -> None:
    """Make base, adapter and merged in a process of its own.

    controls   make their merged checkpoints too
    again      an arm will write a merge of its own beside them
    raises   UnmadeModelError: no room on the disk, or the maker failed
    """
    needed = (COPIES + CONTROLS * controls + AGAIN * again) * bytes_of(shape)
    free = shutil.disk_usage(case.folder).free
    if needed > free:
        raise UnmadeModelError(f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
    options = ["--controls"] if controls else []
    command = python("-m", "benchmarks.checker.models", shape.name, case.folder, *options)
    run = measured(command, replace(settings, seconds=inf))
    if run.failed:
        raise UnmadeModelError(f"the model could not be made: {run.failed}")


def entry(
    shape: Shape, case: Case, arms: Sequence[Arm], settings: Settings, *, repeats: int, cold: bool, tell: Tell
) -> dict[str, Any]:
    """What the model is, and the rows of all arms."""
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    names = {name for file in weights(case.merged) for name in header(file)}
    factors = [name for file in weights(case.adapter) for name in header(file)]
    tell(f"{shape.name}: page cache hot")
    hot = rotated(case, arms, settings, repeats=repeats, cold=False, tell=tell)
    if cold:
        tell(f"{shape.name}: page cache cold")
    return {
        "name": shape.name,
        "about": shape.about,
        "merged_bytes": sum(file.stat().st_size for file in weights(case.merged)),
        "tensors": len(names),
        "targets": sum(name.endswith(".lora_A.weight") for name in factors),
        "files": len(weights(case.merged)),
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "hot": hot,
        "cold": rotated(case, arms, settings, repeats=repeats, cold=True, tell=tell) if cold else [],
    }


def weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def header(file: Path) -> list[str]:
    """The names of a safetensors file, without torch."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return [name for name in json.loads(opened.read(size)) if name != "__metadata__"]
