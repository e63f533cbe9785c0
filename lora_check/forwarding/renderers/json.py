"""A forward as the JSON contract has it: `schema` 1, keys are added and never renamed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.forwarding.nouns import Forward


def render(found: Forward, style: Style) -> str:
    """Every module and prompt of a Forward, whatever the style."""
    from lora_check.forwarding.as_json import as_dict  # `--help` loads this file

    return json.dumps(as_dict(found), indent=2, allow_nan=False, default=str) + "\n"


RENDERER = Renderer(name="json", render=render)
