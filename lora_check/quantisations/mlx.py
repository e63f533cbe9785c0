"""MLX: X.weight uint32 with X.scales and X.biases, one of each for a group of a row.

Source: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

from lora_check.quantisations import _sealed
from lora_check.types import Checkpoint, Coded, Quantisation

LEAVES = ("weight", "scales", "biases")


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every packed weight with scales beside it."""
    return [_coded(stem, checkpoint) for stem in _sealed.modules(checkpoint, "weight", ("scales",), ("uint32",))]


def _coded(stem: str, checkpoint: Checkpoint) -> Coded:
    packed, groups = (checkpoint.metas()[f"{stem}{leaf}"].shape for leaf in LEAVES[:2])
    said = checkpoint.config.get("quantization") or checkpoint.config.get("quantization_config") or {}
    size = said.get("group_size")
    shape = (*packed[:-1], groups[-1] * size) if isinstance(size, int) and groups else ()
    return _sealed.sealed(checkpoint, stem, LEAVES, codes="MLX codes", shape=shape, reason=_sealed.OPAQUE)


QUANTISATION = Quantisation(name="mlx", find=find)
