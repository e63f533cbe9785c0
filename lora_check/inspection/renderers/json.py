"""An inspection as the JSON contract has it: `schema` 1, keys are added and never renamed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.inspection.outcome import Inspection


def render(seen: Inspection, style: Style) -> str:
    """Every module of an Inspection, whatever the style."""
    return json.dumps(seen.as_dict(), indent=2, allow_nan=False) + "\n"


RENDERER = Renderer(name="json", render=render)
