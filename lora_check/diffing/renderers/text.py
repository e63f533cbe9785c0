"""A difference as a person reads it on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.diffing.nouns import Difference


def render(found: Difference, style: Style) -> str:
    """The page of a Difference."""
    from lora_check.diffing.words import text  # `--help` loads this file

    return text(found, style)


RENDERER = Renderer(name="text", render=render)
