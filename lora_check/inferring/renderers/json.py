"""An inference as the JSON contract has it: `schema` 1, keys are added and never renamed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.inferring.extracting import Told


def render(told: Told, style: Style) -> str:
    """Every tensor of what was Told, whatever the style."""
    from lora_check.inferring.as_json import as_dict  # `--help` loads this file

    return json.dumps(as_dict(told.inference, told.extracted), indent=2, allow_nan=False) + "\n"


RENDERER = Renderer(name="json", render=render)
