"""W <- W - s Q_r R_r, as the adapter is loaded; the plain recipe then adds s B A.

W      base   as it is stored, also where that is (in, out)
Q, R   QR     of W in float32; the first r columns and rows, r as many as lora_A has rows

An adapter with init_lora_weights="olora" that was not converted when it was saved: PEFT decomposes the base again and
keeps W - (s Q_r) R_r in its dtype. Another LAPACK has other last bits, so only the product is bounded. Source:
"OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models" (2024); PEFT tuners/lora/layer.py
LoraLayer.olora_init.
"""

from lora_check.recipes._low_rank import is_in_out, is_out_in
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """Q_r R_r times s, which PEFT multiplies into Q."""
    from lora_check.decompositions import first_columns_span

    scale = float(site.settings["scale"])
    return {"taken": first_columns_span(factors["W"], site.roles["A"][0], scale)}


def replace(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
    """(W - s Q_r R_r)[rows]."""
    return w - factors["taken"][rows]


def fits(site: Site) -> bool:
    """A pair of factors that started as the first columns of a linear layer's weight."""
    said, roles = site.settings, site.roles
    if str(said.get("init_lora_weights")).lower() != "olora" or said.get("kasa_config") is not None or site.multihead:
        return False
    linear = site.parameter.endswith(".weight") and (is_out_in(site) or is_in_out(site))
    return linear and set(roles) - {"m"} == {"A", "B"} and roles["A"][0] <= min(site.shape)


RECIPE = Recipe(
    name="olora-base",
    formula="W <- W - s Q_r R_r",
    fits=fits,
    prepare=prepare,
    replace=replace,
    reads="whole",
    loads=True,
)
