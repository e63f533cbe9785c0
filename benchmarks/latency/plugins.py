"""A folder of plug-ins -> a mapping of their constants: backends, workloads, clocks.

A plug-in is one file with one module-level constant; the folder is the list. Files whose name starts with an underscore
are private helpers of their folder.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

from lora_check.errors import RegistryError

CONSTANTS = {"backends": "BACKEND", "clocks": "CLOCK", "workloads": "WORKLOAD"}


@cache
def load(folder: str, package: str = "benchmarks.latency") -> Mapping[str, Any]:
    """Import every module of a plug-in folder and map the name of each constant to it, in the order of the tables.

    folder   one of CONSTANTS
    returns  read-only mapping, ordered by `place`, then by name
    raises   RegistryError: a file without its constant, or two files with one name
    """
    constant = CONSTANTS[folder]
    found: dict[str, Any] = {}
    homes: dict[str, str] = {}
    for home in _modules(folder, package):
        entry = getattr(import_module(home), constant, None)
        if entry is None:
            raise RegistryError(f"{home} has no {constant}", hint=f"define {constant} in that file")
        if entry.name in found:
            raise RegistryError(
                f"{home} and {homes[entry.name]} both register {entry.name!r}", hint="rename one of them"
            )
        found[entry.name], homes[entry.name] = entry, home
    return MappingProxyType({name: found[name] for name in sorted(found, key=lambda name: (found[name].place, name))})


def _modules(folder: str, package: str) -> list[str]:
    root = import_module(f"{package}.{folder}")
    names = sorted(info.name for info in pkgutil.iter_modules(root.__path__) if not info.name.startswith("_"))
    return [f"{package}.{folder}.{name}" for name in names]
