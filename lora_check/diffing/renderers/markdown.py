"""A difference as GitHub shows it in a comment or a job summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.diffing.nouns import Difference


def render(found: Difference, style: Style) -> str:
    """The page of a Difference."""
    from lora_check.diffing.words import markdown  # `--help` loads this file

    return markdown(found, style)


RENDERER = Renderer(name="markdown", render=render)
