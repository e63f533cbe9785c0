"""A forward as a person reads it on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.report import Renderer, Style

if TYPE_CHECKING:
    from lora_check.forwarding.nouns import Forward


def render(found: Forward, style: Style) -> str:
    """The page of a Forward."""
    from lora_check.forwarding.pages import text  # `--help` loads this file

    return text(found, style)


RENDERER = Renderer(name="text", render=render)
