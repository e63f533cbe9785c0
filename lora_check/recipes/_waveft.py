"""WaveFT's configuration, and the filters of its wavelets."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lora_check.recipes._spectrum import COMMON, seed_and_scale, seedless
from lora_check.types import Method

FAMILIES = frozenset(
    {
        *(f"db{order}" for order in range(1, 11)),
        *(f"sym{order}" for order in range(2, 11)),
        *(f"coif{order}" for order in range(1, 4)),
    }
)
"""The wavelets for which PEFT has filters, and the right ones; those that it writes down for coif4 and coif5 are no
coiflets, and for all others that its configuration admits it has none."""


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The seed, k, and the synthesis filters unless the coefficients themselves are the delta."""
    found = seed_and_scale(raw, scaling=25.0)
    return found | ({"filters": _filters(_family(raw))} if _family(raw) else {})


def refuses(raw: Mapping[str, Any]) -> str:
    """Adapters whose coefficients lie where nobody can say, and wavelets whose filters are not known here."""
    family = _family(raw)
    if family and family not in FAMILIES:
        return f"the filters that PEFT takes for the wavelet {family!r} are not known here"
    if family and find_spec("pywt") is None:
        return f"the filters of {family} come from PyWavelets, which is not installed: pip install pywavelets"
    return seedless(raw)


def _family(raw: Mapping[str, Any]) -> str:
    """The name of the wavelet; nothing, where none is used."""
    return str(raw.get("wavelet_family") or "db1") if raw.get("use_idwt", True) else ""


def _filters(family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low-pass and high-pass synthesis filters of an orthogonal wavelet."""
    wavelet = import_module("pywt").Wavelet(family)
    return tuple(wavelet.rec_lo), tuple(wavelet.rec_hi)


METHOD = Method(
    name="WAVEFT",
    roles={"waveft_spectrum": "c"},
    keys=COMMON | {"proportional_parameters", "use_idwt", "wavelet_family"},
    settings=settings,
    refuses=refuses,
)
