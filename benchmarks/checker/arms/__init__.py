"""One way to judge a merge a file: a module-level ARM, and where it is a script, the script."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from benchmarks.checker.nouns import Arm


def load() -> dict[str, Arm]:
    """Every arm of this folder by name, in the order of the tables."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    found = [import_module(f"{__name__}.{name}").ARM for name in names]
    return {arm.name: arm for arm in sorted(found, key=lambda arm: arm.place)}
