"""A folder of plug-ins -> a mapping of their constants.

A plug-in is one file with one module-level constant. There is no list to edit and nothing to decorate: the
folder is the list. Files whose name starts with an underscore are private helpers of their folder.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

from lora_check.errors import RegistryError

CONSTANTS = {
    "combinations": "COMBINATION",
    "commands": "COMMAND",
    "dialects": "DIALECT",
    "engines": "ENGINE",
    "faults": "FAULT",
    "formats": "FORMAT",
    "layouts": "LAYOUT",
    "quantisations": "QUANTISATION",
    "recipes": "RECIPE",
    "renderers": "RENDERER",
}


@cache
def load(folder: str, package: str = "lora_check", constant: str | None = None) -> Mapping[str, Any]:
    """Import every module of a plug-in folder in name order and map each constant's key to it.

    folder     of that package
    constant   what each file of the folder has; by default that of CONSTANTS
    returns    read-only mapping; the key is the constant's `code` if it has one, else its `name`
    raises     RegistryError: a file without its constant, or two files with one key
    """
    constant = constant or CONSTANTS[folder]
    found: dict[str, Any] = {}
    homes: dict[str, str] = {}
    for name in _modules(folder, package):
        entry = getattr(import_module(name), constant, None)
        if entry is None:
            raise RegistryError(f"{name} has no {constant}", hint=f"define {constant} in that file")
        key = getattr(entry, "code", None) or entry.name
        if key in found:
            raise RegistryError(f"{name} and {homes[key]} both register {key!r}", hint="rename one of them")
        found[key], homes[key] = entry, name
    return MappingProxyType(found)


def page(folder: str, key: str) -> str:
    """The module docstring of the plug-in registered under `key`: its page in the manual."""
    for name in _modules(folder, "lora_check"):
        module = import_module(name)
        entry = getattr(module, CONSTANTS[folder])
        if key in (getattr(entry, "code", None), entry.name):
            return (module.__doc__ or "").strip()
    raise RegistryError(f"no {CONSTANTS[folder]} is registered as {key!r}", hint="see `rules` for the codes")


def _modules(folder: str, package: str) -> list[str]:
    root = import_module(f"{package}.{folder}")
    names = sorted(info.name for info in pkgutil.iter_modules(root.__path__) if not info.name.startswith("_"))
    return [f"{package}.{folder}.{name}" for name in names]
