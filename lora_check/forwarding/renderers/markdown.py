"""A forward as GitHub shows it in a comment or a model card."""

from __future__ import annotations

from typing import Any

from lora_check.report import Renderer, Style


def render(found: Any, style: Style) -> str:
    """The page of a Forward."""
    from lora_check.forwarding.pages import markdown  # `--help` loads this file

    return markdown(found, style)


RENDERER = Renderer(name="markdown", render=render)
