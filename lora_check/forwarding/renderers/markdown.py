"""A forward as GitHub shows it in a comment or a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.forwarding.nouns import Forward


def render(found: Forward, style: Style) -> str:
    """The page of a Forward."""
    from lora_check.forwarding.pages import markdown  # `--help` loads this file

    return markdown(found, style)


RENDERER = Renderer(name="markdown", render=render)
