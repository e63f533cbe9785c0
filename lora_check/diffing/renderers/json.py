"""A difference as the JSON contract has it: `schema` 1, keys are added and never renamed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.diffing.nouns import Difference


def render(found: Difference, style: Style) -> str:
    """Every tensor of a Difference, whatever the style."""
    from lora_check.diffing.as_json import as_dict  # `--help` loads this file

    return json.dumps(as_dict(found), indent=2, allow_nan=False) + "\n"


RENDERER = Renderer(name="json", render=render)
