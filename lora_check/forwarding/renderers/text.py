"""A forward as a person reads it on a terminal."""

from __future__ import annotations

from typing import Any

from lora_check.report import Renderer, Style


def render(found: Any, style: Style) -> str:
    """The page of a Forward."""
    from lora_check.forwarding.pages import text  # `--help` loads this file

    return text(found, style)


RENDERER = Renderer(name="text", render=render)
