"""What a result was computed with."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of the libraries a check rests on."""
    libraries = {name: _version(name) for name in ("torch", "safetensors", "numpy")}
    return {"lora_check": _version("lora_check"), "python": sys.version.split()[0], **libraries}


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"
