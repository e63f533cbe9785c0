"""The report as the JSON contract has it: `schema` 1, keys are added and never renamed."""

from __future__ import annotations

import json

from lora_check.report import Renderer, Report, Style


def render(report: Report, style: Style) -> str:
    """Every tensor, whatever the style; a number that JSON cannot hold is null already."""
    return json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n"


RENDERER = Renderer(name="json", render=render)
