"""IA3's names and configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_check.types import Method


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Whether `feedforward_modules` names the module; only over a convolution with in = out l does not show it itself.

    Source: PEFT tuners/ia3/model.py IA3Model._check_target_module_feedforward.
    """
    named = raw.get("feedforward_modules") or ()
    if isinstance(named, str):
        return {"feedforward": re.fullmatch(named, module) is not None}
    return {"feedforward": any(module.endswith(one) for one in named)}


METHOD = Method(
    name="IA3",
    roles={"ia3_l": "l"},
    keys=frozenset({"feedforward_modules", "init_ia3_weights"}),
    settings=settings,
)
