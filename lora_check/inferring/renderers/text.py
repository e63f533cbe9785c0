"""An inference as a person reads it on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.inferring.extracting import Told


def render(told: Told, style: Style) -> str:
    """The page of what was Told."""
    from lora_check.inferring.page import text  # `--help` loads this file

    return text(told.inference, told.extracted, style)


RENDERER = Renderer(name="text", render=render)
