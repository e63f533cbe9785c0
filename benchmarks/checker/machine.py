"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checker.nouns import ROOT, Settings

LIBRARIES = ("torch", "safetensors", "numpy", "peft", "transformers")
MATRIX_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Flags of /proc/cpuinfo that decide how fast a product of small matrices is."""


def machine(settings: Settings) -> dict[str, Any]:
    """Processor, memory, kernel and versions: what has to be equal for two results to be compared."""
    return {
        "cpu": processor("model name") or platform.machine(),
        "units": [flag for flag in MATRIX_UNITS if flag in processor("flags").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()}
        | {name: installed(name) for name in LIBRARIES}
        | extra(settings),
    }


def circumstances(repeats: int) -> dict[str, Any]:
    """What is new in each run."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "repeats": repeats,
        "load": round(os.getloadavg()[0], 1),
    }


def processor(field: str) -> str:
    """One field of the first processor in /proc/cpuinfo; empty if there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def installed(name: str) -> str:
    """The version of a library here."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def extra(settings: Settings) -> dict[str, str]:
    """The version of mergekit in its own environment."""
    if settings.mergekit is None:
        return {"mergekit": installed("mergekit")}
    ask = "from importlib.metadata import version; print(version('mergekit'))"
    told = subprocess.run([settings.mergekit, "-c", ask], capture_output=True, text=True, check=False)  # noqa: S603
    return {"mergekit": told.stdout.strip() or "none"}


def commit() -> str:
    """The commit of this tree, and `-dirty` if files differ from it."""
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
