"""Say what a merge with any one tuner of PEFT must give: float64, NumPy alone, no line of lora_check."""

from __future__ import annotations

from collections.abc import Mapping

from . import additive, seeded
from .additive import Array, Pair, Site, merged_parameters

__all__ = ["Array", "Pair", "Site", "merged", "merged_parameters"]

DELTAS = additive.DELTAS | seeded.DELTAS
PAIRS = additive.PAIRS | seeded.PAIRS


def merged(
    peft_type: str,
    module: str,
    parts: Mapping[str, Array],
    shared: Mapping[str, Array],
    config: Mapping,
    weight: Array,
    bias: Array | None = None,
    *,
    in_out: bool = False,
    targets: Mapping[str, tuple[int, int]] | None = None,
    given: Mapping[str, object] | None = None,
) -> Pair:
    """Merge one module's adapter into its weight and bias.

    parts: suffix on disk -> tensor; shared: whole name on disk -> tensor; targets: every adapted module in model
    order -> (out, in); in_out: weight is laid out (in, out), as a transformers Conv1D's is.
    given: what no file holds, 'positions' (FourierFT, WaveFT), 'low_pass' (WaveFT), 'signs' (PSOFT), 'rows' (AdaMSS).
    """
    logical = weight.T if in_out else weight
    site = Site(module, parts, shared, config, logical, bias, targets or {module: logical.shape[:2]}, given or {})
    if peft_type in PAIRS:
        made, moved = PAIRS[peft_type](site)
    else:
        made, moved = logical + DELTAS[peft_type](site), bias
    return made.T if in_out else made, moved
