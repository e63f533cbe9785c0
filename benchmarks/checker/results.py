"""The JSON file of a benchmark: raw rows, one entry a size; what is measured anew takes the place of what was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = 1


def load(file: Path) -> dict[str, Any]:
    """What a file holds."""
    found: dict[str, Any] = json.loads(file.read_text())
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{file}: schema {found.get('schema')!r} is not {SCHEMA}")
    return found


def begin(file: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The results so far if they are of this very machine with these very versions, else none."""
    if file.exists() and (found := load(file))["machine"] == machine:
        return found
    return {"schema": SCHEMA, "machine": machine, "sizes": [], "controls": None, "profile": None}


def put(results: dict[str, Any], entry: dict[str, Any]) -> None:
    """Set the entry of a size, in the order of the sizes' bytes."""
    others = [one for one in results["sizes"] if one["name"] != entry["name"]]
    results["sizes"] = sorted([*others, entry], key=lambda one: one["merged_bytes"])


def save(results: dict[str, Any], file: Path) -> None:
    """Write the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(file)
