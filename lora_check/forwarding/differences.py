"""What lies beside the weights and differs: keys of config.json and of generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_check.errors import InputError

FILES = ("config.json", "generation_config.json")
OF_THE_SAVE = frozenset({"transformers_version", "_from_model_config", "_name_or_path", "use_cache"})
"""Keys that say how a file was written, or that change no number."""

SAMPLING = frozenset({"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"})
"""Keys of generation_config.json that a greedy continuation does not follow."""

Differences = dict[str, dict[str, tuple[Any, Any]]]


def differences(base: Path, merged: Path, alike: Collection[str] = ()) -> Differences:
    """File -> key -> what BASE's and MERGED's say; None where one of them is silent.

    alike   keys of config.json that mean the same in both once the defaults are filled in: silence is no difference
    """
    found = {name: _keys(_read(base / name), _read(merged / name)) for name in FILES}
    ours = found[FILES[0]]
    found[FILES[0]] = {key: two for key, two in ours.items() if not (None in two and key in alike)}
    return {name: keys for name, keys in found.items() if keys}


def _keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*ours, *theirs]):
        old, new = ours.get(key), theirs.get(key)
        if old == new or key in OF_THE_SAVE:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= _keys(old, new, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = (old, new)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; nothing where there is none.

    raises   InputError: it is damaged, and what it says cannot be told from silence
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"could not read {path}: {error}", hint="write it again, or take it away") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object", hint="write it again, or take it away")
    return found


def sampled(*folders: Path) -> tuple[str, ...]:
    """The keys of sampling that one of the generation configurations sets, and that nothing here follows."""
    said = [_read(folder / "generation_config.json") for folder in folders]
    return tuple(sorted(key for key in SAMPLING if any(one.get(key) not in (None, False) for one in said)))
