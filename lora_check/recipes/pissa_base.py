"""W <- W - U_r S_r V_r^T, as the adapter is loaded; the plain recipe then adds s B A.

W         base   (out, in), or (in, out) in a Conv1D of transformers
U, S, V   SVD    of W (out, in) in float32; the r largest singular values, r as many as lora_A has rows

An adapter with init_lora_weights="pissa" that was not converted when it was saved: PEFT decomposes the base again and
keeps what B0 = U sqrt(S / s), A0 = sqrt(S / s) V^T leave of it, W - (s B0) A0, in the dtype of the base. Another LAPACK
has other last bits, so only the product is bounded. Source: Meng et al., "PiSSA" (2024), eq. 2 to 4; PEFT
tuners/lora/layer.py LoraLayer.pissa_init.
"""

from lora_check.recipes._low_rank import is_in_out, is_out_in
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """U_r S_r V_r^T, multiplied out as PEFT does."""
    from lora_check.decompositions import leading

    scale = float(site.settings["scale"])

    def product(u: Numbers, s: Numbers, vt: Numbers) -> Numbers:
        root = (s / scale).sqrt()
        return ((u * root) * scale) @ (root[:, None] * vt)

    rank, w = site.roles["A"][0], factors["W"]
    if is_in_out(site):
        return {"taken": leading(w.T, rank, product).T}
    return {"taken": leading(w, rank, product)}


def replace(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
    """(W - U_r S_r V_r^T)[rows]."""
    return w - factors["taken"][rows]


def fits(site: Site) -> bool:
    """A pair of factors that started as the largest part of a linear layer's weight."""
    said, roles = site.settings, site.roles
    if said.get("init_lora_weights") != "pissa" or said.get("kasa_config") is not None or site.multihead:
        return False
    linear = site.parameter.endswith(".weight") and (is_out_in(site) or is_in_out(site))
    return linear and set(roles) - {"m"} == {"A", "B"} and roles["A"][0] <= min(site.shape)


RECIPE = Recipe(
    name="pissa-base",
    formula="W <- W - U_r S_r V_r^T",
    fits=fits,
    prepare=prepare,
    replace=replace,
    reads="whole",
    loads=True,
)
