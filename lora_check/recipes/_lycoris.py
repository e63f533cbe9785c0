"""LoHa and LoKr share PEFT's LycorisLayer: scale alpha / r with patterns, the same keys of the configuration."""

from __future__ import annotations

COMMON = frozenset(
    {
        "decompose_both",
        "decompose_factor",
        "module_dropout",
        "rank_dropout",
        "rank_dropout_scale",
        "use_effective_conv2d",
    }
)
"""Keys that decide shapes, which the tensors show, or what happens in training."""
