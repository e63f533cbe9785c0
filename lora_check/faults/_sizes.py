"""Bytes as a person says them."""

from __future__ import annotations

from collections.abc import Iterable

from lora_check.types import TensorMeta


def total(metas: Iterable[TensorMeta]) -> int:
    """The bytes of some tensors."""
    return sum(meta.nbytes for meta in metas)


def spoken(count: int) -> str:
    """'87 GB', '1.4 MB', '640 B': decimal units, as disks are sold."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
