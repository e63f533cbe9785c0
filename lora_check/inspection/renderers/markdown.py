"""An inspection as GitHub shows it in a comment or a job summary."""

from __future__ import annotations

from typing import Any

from lora_check.report import Renderer, Style


def render(seen: Any, style: Style) -> str:
    """The page of an Inspection, which has no other style."""
    from lora_check.inspection.page import render as page  # `--help` loads this file

    return page(seen, "markdown")


RENDERER = Renderer(name="markdown", render=render)
