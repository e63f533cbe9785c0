"""What a run was measured on, and with what: the header of its results. It names no host, person or path."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from benchmarks.latency.nouns import Place

LIBRARIES = ("torch", "triton", "transformers", "peft", "numpy")
ASKED = ("uuid", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
"""Fields of nvidia-smi; the first only tells which line is ours, and is not kept."""
CLOCKS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "celsius", "power.draw": "watt"}
UNKNOWN = "unknown"


def environment(place: Place, *, seed: int, command: Sequence[str], commit: str = "") -> dict[str, object]:
    """The header, made when the settings of the run are in force and before anything is measured.

    commit   of the code, where it runs without its repository
    """
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(map(without_folders, command)),
        "commit": commit or _commit(),
        "seed": seed,
        "device": device(place),
        "processor": processor(),
        "versions": versions(),
        "precision": precision(),
        "threads": threads(),
        "clocks": {"before": clocks(place), "after": None},
    }


def ended(begun: Mapping[str, object], place: Place) -> dict[str, object]:
    """The header with the clocks as they are when everything was measured."""
    seen: Any = begun["clocks"]
    return {**begun, "clocks": {**seen, "after": clocks(place)}}


def device(place: Place) -> dict[str, Any]:
    """What the forwards run on: a GPU, or one core of the processor. Sizes in bytes."""
    if place.kind != "cuda":
        return {"kind": place.kind, "name": processor()["name"], "cache": place.cache, "memory": _memory()}
    import torch

    found = torch.cuda.get_device_properties(torch.device(place.device))
    return {
        "kind": place.kind,
        "name": found.name,
        "cache": place.cache,
        "memory": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "driver": asked(place).get("driver_version", UNKNOWN),
    }


def processor() -> dict[str, Any]:
    """Name, matrix units and usable cores."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    split = (line.partition(":") for line in lines)
    found = {key.strip(): value.strip() for key, _, value in reversed(list(split))}
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in found.get("flags", "").split()]
    name = found.get("model name") or platform.machine()
    return {"name": name, "units": units, "cores": len(os.sched_getaffinity(0))}


def versions() -> dict[str, str | None]:
    """Of the interpreter, the libraries, and CUDA as torch was built for it; None: not there."""
    import torch

    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return {**found, **{name: _installed(name) for name in LIBRARIES}}


def precision() -> dict[str, object]:
    """The switches that let a product be less exact than its dtype says."""
    import torch

    matmul = torch.backends.cuda.matmul
    return {
        "tf32": matmul.allow_tf32,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "bfloat16_reduced": matmul.allow_bf16_reduced_precision_reduction,
        "float16_reduced": matmul.allow_fp16_reduced_precision_reduction,
    }


def threads() -> dict[str, int]:
    """Threads within one operation, and between them."""
    import torch

    return {"within": torch.get_num_threads(), "between": torch.get_num_interop_threads()}


def clocks(place: Place) -> dict[str, float | None]:
    """MHz, degrees and watts now; None: nobody here can say."""
    if place.kind == "cuda":
        found = asked(place)
        return {name: _number(found.get(field, "")) for field, name in CLOCKS.items()}
    try:
        seen = importlib.import_module("psutil").cpu_freq()
    except (ImportError, OSError, NotImplementedError):
        seen = None
    return {"cpu_mhz": seen.current if seen else None}


def asked(place: Place) -> dict[str, str]:
    """What nvidia-smi says of our device, field by field; empty where it is not there, or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = [[one.strip() for one in line.split(",")] for line in told.stdout.splitlines() if line.strip()]
    return line_of(lines, "" if len(lines) < 2 else _uuid(place))


def line_of(lines: Sequence[Sequence[str]], uuid: str) -> dict[str, str]:
    """The fields of the device with that uuid, which nvidia-smi writes with `GPU-` before it; "" fits any."""
    whole = (line for line in lines if len(line) == len(ASKED) and line[0].endswith(uuid))
    return dict(zip(ASKED, next(whole, ()), strict=False))


def without_folders(argument: str) -> str:
    """An argument of the command line, its absolute path, if it is one or has one after `=`, cut to the last name."""
    option, equals, value = argument.rpartition("=")
    absolute = Path(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("~")
    return option + equals + (PureWindowsPath(value).name if absolute else value)


def _uuid(place: Place) -> str:
    import torch

    return str(getattr(torch.cuda.get_device_properties(torch.device(place.device)), "uuid", UNKNOWN))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _commit() -> str:
    """The commit of this tree, and `-dirty` if files differ from it."""
    here = Path(__file__).parent
    ask = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
