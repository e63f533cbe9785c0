"""PEFT 0.1 and 0.2 with `enable_lora`: layers of several outputs, some of them with a LoRA of their own

    base_model.model.<module path>.lora_A.weight (n r, in), .lora_B.weight (n o, r, 1)

Only layers whose factors are of some outputs are read so; what has one pair for all of them is an ordinary LoRA.

Source: PEFT 0.2 tuners/lora.py MergedLinear
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.adapters.config import parse_config
from lora_check.dialects._groups import flags, spread
from lora_check.dialects._shared import whole
from lora_check.types import Adapter, Checkpoint, Dialect, Part

GROUPS = 2
"""Whatever is enabled: other numbers than two outputs of three were never merged by these releases."""

PREFIX = "base_model.model."
ROLES = {"lora_A.weight": "A", "lora_B.weight": "B"}
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_[AB]\.weight)")


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """A configuration with PEFT's type that enables some outputs."""
    return config.get("peft_type") == "LORA" and bool(flags(config.get("enable_lora")))


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Parse configuration and names; headers only.

    raises   AdapterConfigError: a value that cannot be, naming key and value
    """
    parts: list[Part] = []
    for name in checkpoint.metas():
        inner = name.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(inner)
        factor = Part(tensor=name, module=match["module"], role=ROLES[match["leaf"]]) if match else None
        parts.append(factor or replace(*whole([name]), module=inner))
    config = parse_config(raw, checkpoint.location)
    return Adapter(
        config=replace(config, targets=(), producer="peft 0.2"),
        checkpoint=checkpoint,
        dialect="merged-linear",
        parts=tuple(parts),
    )


def bind(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Lay the factors of some outputs over the whole layer."""
    return spread(adapter, base, flags(adapter.config.raw["enable_lora"]), groups=GROUPS)


DIALECT = Dialect(name="merged-linear", recognises=recognises, read=read, bind=bind)
