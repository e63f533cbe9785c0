"""What a checkpoint calls itself, and what an adapter calls its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CACHE = re.compile(r"(?:^|[/\\])models--(?:[^/\\]+--)?(?P<name>[^/\\]+)")
_HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")


def is_hub_name(name: str) -> bool:
    """'owner/name' or 'name'."""
    return bool(_HUB_ID.fullmatch(name))


def is_local_path(name: str) -> bool:
    """A path that can be no hub name: it begins at a root, in this folder, at home, or goes three levels deep."""
    return bool(name) and not is_hub_name(name)


def claims(config: Mapping[str, Any], location: str = "") -> tuple[str, ...]:
    """The hub names that a cache folder and a configuration give a model."""
    cached, name = _CACHE.search(location), config.get("_name_or_path")
    known = [cached["name"]] if cached else []
    return (*known, name) if isinstance(name, str) and is_hub_name(name) else tuple(known)


def last(name: str) -> str:
    """The last part of a name or path, in small letters."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
