"""AWQ: X.qweight int32, (in, out / 8), with qzeros and scales.

PEFT cannot merge into an AWQ model, so a merge either was made on the unquantised weights or was not made.

Source: Lin et al. 2023, "AWQ"
"""

from __future__ import annotations

from lora_check.quantisations import _sealed
from lora_check.types import Checkpoint, Coded, Quantisation

LEAVES = ("qweight", "qzeros", "scales")


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every module whose qweight holds several outputs in a column."""
    metas, found = checkpoint.metas(), []
    for stem in _sealed.modules(checkpoint, "qweight", ("qzeros", "scales")):
        weight, scales = metas[f"{stem}qweight"].shape, metas[f"{stem}scales"].shape
        if len(weight) == len(scales) == 2 and weight[1] != scales[1]:
            shape = scales[1], weight[0]
            found.append(_sealed.sealed(checkpoint, stem, LEAVES, codes="AWQ", shape=shape, reason=_sealed.REFUSED))
    return found


QUANTISATION = Quantisation(name="awq", find=find)
