"""A folder of plug-ins -> a mapping of their constants: backends, workloads, clocks.

A plug-in is one file with one module-level constant; the folder is the list. Files whose name starts with an underscore
are private helpers of their folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lora_check import registry

CONSTANTS = {"backends": "BACKEND", "clocks": "CLOCK", "workloads": "WORKLOAD"}


def load(folder: str, package: str = "benchmarks.latency") -> Mapping[str, Any]:
    """Every plug-in of a folder, in the order of the tables.

    folder   one of CONSTANTS
    returns  read-only mapping, ordered by `place`, then by name
    raises   RegistryError: a file without its constant, or two files with one name
    """
    found = registry.load(folder, package, CONSTANTS[folder])
    return MappingProxyType({name: found[name] for name in sorted(found, key=lambda name: (found[name].place, name))})
