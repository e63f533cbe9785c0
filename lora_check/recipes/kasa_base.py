"""W <- U_k S_k V_k^T, as the adapter is loaded; the KaSA recipe then adds s (B * d) A.

W         base   (out, in)
U, S, V   SVD    of W in float32, without its r smallest singular values: k = min(out, in) - r

PEFT truncates the base once for each adapter it loads, and keeps the result in its dtype. Another LAPACK has other last
bits, so only the product is bounded. Source: Wang et al., "KaSA" (2025); PEFT tuners/lora/variants.py
KasaLinearVariant._truncate_base_weight.
"""

from lora_check.recipes._low_rank import is_out_in
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """U_k S_k V_k^T."""
    from lora_check.decompositions import leading

    kept = min(site.shape) - site.roles["A"][0]
    return {"kept": leading(factors["W"], kept, lambda u, s, vt: (u * s) @ vt)}


def replace(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
    """(U_k S_k V_k^T)[rows]."""
    return factors["kept"][rows]


def fits(site: Site) -> bool:
    """Factors with a diagonal between them over a linear layer, of fewer rows than the weight has singular values."""
    said, roles = site.settings, site.roles
    plain = str(said.get("init_lora_weights")).lower() not in ("pissa", "olora")
    if said.get("kasa_config") is None or not plain or not site.parameter.endswith(".weight"):
        return False
    return set(roles) == {"A", "B", "diag"} and is_out_in(site) and roles["A"][0] < min(site.shape)


RECIPE = Recipe(
    name="kasa-base",
    formula="W <- U_k S_k V_k^T",
    fits=fits,
    prepare=prepare,
    replace=replace,
    reads="whole",
    loads=True,
)
