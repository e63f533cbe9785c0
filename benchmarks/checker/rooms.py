"""`python -m benchmarks.checker.rooms BASE ADAPTER MERGED`: one report under cProfile, its seconds by file.

torch and safetensors are imported before the profile begins. What a C function takes counts for the file that called
it, so the products and comparisons of torch stand with the loop that asks for them.
"""

from __future__ import annotations

import contextlib
import cProfile
import io
import json
import pstats
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.checker.nouns import ROOT

PACKAGE = ROOT / "lora_check"
NATIVE = "~"
"""The file name that pstats gives to what is written in C."""
MOST = 10
"""Files listed; all others are summed up."""

Function = tuple[str, int, str]


def main(base: str, adapter: str, merged: str) -> None:
    """Profile a report and print its rooms."""
    import safetensors.torch  # noqa: F401  what every report imports stays out of the profile
    import torch  # noqa: F401

    from lora_check.__main__ import main as command

    profiles = [cProfile.Profile(time.thread_time)]

    def begin(*_: Any) -> None:
        """The first event of a new thread puts a profile of its own in this function's place."""
        profiles.append(cProfile.Profile(time.thread_time))
        profiles[-1].enable()

    if sys.version_info < (3, 12):  # from 3.12 on a profile sees every thread
        threading.setprofile(begin)
    with contextlib.redirect_stdout(io.StringIO()):
        profiles[0].enable()
        command(["report", base, adapter, merged, "--jobs", "1"])
        profiles[0].disable()
    threading.setprofile(None)  # type: ignore[arg-type]
    print(json.dumps(by_room(profiles)))


def by_room(profiles: list[cProfile.Profile]) -> list[dict[str, Any]]:
    """Seconds and calls of each room, the largest first."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    stats: dict[Function, Any] = pstats.Stats(*profiles).stats  # type: ignore[attr-defined]
    for function, (_, count, own, _, callers) in stats.items():
        if function[0] == NATIVE and callers:
            for caller, (times, _, share, _) in callers.items():
                seconds[room(caller)] += share
                calls[room(caller)] += times
        else:
            seconds[room(function)] += own
            calls[room(function)] += count
    ordered = sorted(seconds, key=lambda name: -seconds[name])
    kept, rest = ordered[:MOST], ordered[MOST:]
    rows = [{"room": name, "cpu": seconds[name], "calls": calls[name]} for name in kept]
    other = {"room": "all else", "cpu": sum(seconds[x] for x in rest), "calls": sum(calls[x] for x in rest)}
    return [*rows, other] if rest else rows


def room(function: Function) -> str:
    """A file of the package, a folder of its plug-ins, or the word for what lies outside."""
    path, _, name = function
    if name == "<module>" or "importlib" in path:
        return "imports"
    if not path.startswith(str(PACKAGE)):
        return "libraries in Python"
    within = Path(path).relative_to(PACKAGE).parts
    return within[0] if len(within) == 1 else f"{within[0]}/"


if __name__ == "__main__":
    main(*sys.argv[1:])
