"""An inspection as a person reads it on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.inspection.outcome import Inspection


def render(seen: Inspection, style: Style) -> str:
    """The page of an Inspection, which has no other style."""
    from lora_check.inspection.page import render as page  # `--help` loads this file

    return page(seen, "text")


RENDERER = Renderer(name="text", render=render)
