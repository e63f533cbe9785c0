"""An inference as a person reads it on a terminal."""

from __future__ import annotations

from typing import Any

from lora_check.report import Renderer, Style


def render(told: Any, style: Style) -> str:
    """The page of what was Told."""
    from lora_check.inferring.page import text  # `--help` loads this file

    return text(told.inference, told.extracted, style)


RENDERER = Renderer(name="text", render=render)
