"""The base-model prefix comes and goes.

A file of LlamaModel says `layers.0...`, one of LlamaForCausalLM `model.layers.0...`; GPT-2 files of the hub lack the
`transformer.` that the loaded class has. A name is found under one leading segment more or less, if only one such name
is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lora_check.types import Layout, TensorMeta


def resolve(name: str, names: Mapping[str, TensorMeta], config: Mapping[str, Any]) -> str | None:
    """The only name that is `name` with its first segment dropped, or with one segment put before it."""
    _, _, rest = name.partition(".")
    candidates = [f"{head}.{name}" for head in _heads(tuple(names))] + ([rest] if rest else [])
    found = [one for one in candidates if one in names]
    return found[0] if len(found) == 1 else None


@lru_cache(maxsize=8)
def _heads(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.split(".", 1)[0] for name in names if "." in name))


LAYOUT = Layout(name="base-prefix", resolve=resolve)
