"""An inference as GitHub shows it in a comment or a job summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.inferring.extracting import Told


def render(told: Told, style: Style) -> str:
    """The page of what was Told."""
    from lora_check.inferring.page import markdown  # `--help` loads this file

    return markdown(told.inference, told.extracted, style)


RENDERER = Renderer(name="markdown", render=render)
