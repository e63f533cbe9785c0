"""GPTQ: X.qweight int32, (in / codes to an element, out), with qzeros, scales and g_idx.

PEFT refuses to merge into a GPTQ model, so a merge either was made on the unquantised weights or was not made.

Source: Frantar et al. 2022, "GPTQ"; peft.tuners.lora.LoraModel._check_merge_allowed
"""

from __future__ import annotations

from lora_check.quantisations import _sealed
from lora_check.types import Checkpoint, Coded, Quantisation

LEAVES = ("qweight", "qzeros", "scales", "g_idx")


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every module whose qweight has a column for each output."""
    found = []
    for stem in _sealed.modules(checkpoint, "qweight", ("qzeros", "scales")):
        shape = _shape(checkpoint, stem)
        if shape:
            made = _sealed.sealed(checkpoint, stem, LEAVES, codes="GPTQ", shape=shape, reason=_sealed.REFUSED)
            found.append(made)
    return found


def _shape(checkpoint: Checkpoint, stem: str) -> tuple[int, ...]:
    """(out, in); () where the columns are no outputs."""
    metas = checkpoint.metas()
    weight, zeros, scales = (metas[f"{stem}{leaf}"].shape for leaf in LEAVES[:3])
    if len(weight) != 2 or len(scales) != 2 or weight[1] != scales[1]:
        return ()
    order = metas.get(f"{stem}g_idx")
    if order is not None:
        return weight[1], order.numel
    packed = scales[1] // zeros[-1] if zeros[-1] else 1
    return weight[1], weight[0] * packed


QUANTISATION = Quantisation(name="gptq", find=find)
