"""Adapters without a single number: LC003 tells them, LC002 and LC301 keep silent about each of their tensors."""

from __future__ import annotations

from lora_check.types import Adapter

WITHOUT_ELEMENTS = "an adapter tensor without elements"
"""How a plan says that a factor cannot be used because it is empty."""


def is_empty(adapter: Adapter) -> bool:
    """Whether no factor of the adapter has an element."""
    metas = adapter.checkpoint.metas()
    return not any(metas[part.tensor].numel for part in adapter.parts)
