"""W' = W + k B (A * E) / (r + 1e-5).

W   base     (out, in), (in, out) in a Conv1D of transformers, or (out, in, k, k)
A   factor   (kept, in), or (kept, in k k), stored as `lora_A`
E   factor   (kept, 1), stored as `lora_E`: the singular values, one for each row of A
B   factor   (out, kept), stored as `lora_B`
k   scale    lora_alpha if that is positive, else r
r   scale    init_r, however many ranks the allocator kept: PEFT's count of ranks is not in the file

`*` is elementwise; the product is multiplied by k and then divided. Where the allocator kept no rank, the factors have
no elements, PEFT loads the module with r = 0 (0.8 and 0.9 refuse to), and its delta is +0 everywhere. Source: Zhang et
al., "AdaLoRA" (2023), eq. 3; PEFT tuners/adalora/layer.py SVDLinear.get_delta_weight, SVDConv2d.get_delta_weight,
tuners/adalora/model.py AdaLoraModel.resize_modules_by_rank_pattern.
"""

from collections.abc import Mapping
from typing import Any

from lora_check.recipes._paired import flipped, is_turned, pair, product
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Scale, Site

ROUNDED_ABOVE = 256
"""The whole numbers up to here are exact in bfloat16, in which PEFT holds init_r for a moment."""


def refuses(raw: Mapping[str, Any]) -> str:
    """A scale that is not told, or a count of ranks that the model's dtype may change."""
    rank = raw.get("init_r")
    if rank is None or raw.get("lora_alpha") is None:
        return "the configuration of an AdaLoRA adapter does not say init_r and lora_alpha"
    if isinstance(rank, int) and rank > ROUNDED_ABOVE:
        return f"init_r = {rank} is rounded to the dtype of the model, and PEFT divides by what is left"
    return ""


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """How many ranks the allocator's list keeps of init_r: all where it does not name the module, None if it cannot."""
    pattern, rank = raw.get("rank_pattern"), raw.get("init_r")
    if not pattern or (isinstance(pattern, Mapping) and f"{module}.lora_E" not in pattern):
        return {"kept": rank}
    kept = pattern[f"{module}.lora_E"] if isinstance(pattern, Mapping) else None
    if not isinstance(kept, list) or len(kept) != rank or not all(isinstance(one, bool) for one in kept):
        return {"kept": None}
    return {"kept": sum(kept)}


def contradicts(site: Site) -> str:
    """Another number of ranks than PEFT makes room for as it loads them."""
    held, kept = site.roles["E"][0], site.settings["kept"]
    if kept is None:
        return "rank_pattern does not say of each of the init_r ranks whether it is kept"
    return "" if held == kept else f"the configuration keeps {kept} ranks, and lora_E has {held}"


def pruned(site: Site) -> bool:
    """Rank 0 in all three factors, and in the configuration too: without it PEFT cannot load them."""
    return site.settings["kept"] == 0 and 0 not in site.shape and fits(site) and site.roles["E"] == (0, 1)


METHOD = Method(
    name="ADALORA",
    patterns=False,
    roles={"lora_A": "A", "lora_B": "B", "lora_E": "E"},
    keys=frozenset(
        {
            "arrow_expert_num",
            "beta1",
            "beta2",
            "bias",
            "deltaT",
            "init_lora_weights",
            "lora_dropout",
            "megatron_core",
            "orth_reg_weight",
            "qalora_group_size",
            "r",
            "runtime_config",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
            "use_rslora",
        }
    ),
    alpha="lora_alpha",
    rank="init_r",
    settings=settings,
    refuses=refuses,
    contradicts=contradicts,
    pruned=pruned,
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """B and A * E."""
    return pair(factors["B"], factors["A"] * factors["E"], site)


def scaled(product: Numbers, scale: Scale) -> Numbers:
    """k product / (r + 1e-5)."""
    from lora_check.functions import like

    k = scale.alpha if scale.alpha > 0 else scale.rank
    return product * (scale.weight * k) / (like(product, float(scale.rank)) + like(product, 1.0) * 1e-5)


def fits(site: Site) -> bool:
    """A triple of one rank over a matrix or a two-dimensional convolution."""
    roles = site.roles
    if set(roles) != {"A", "B", "E"} or len(site.shape) not in (2, 4):
        return False
    a, b = roles["A"], roles["B"]
    ranks = len(a) == len(b) == 2 and a[0] == b[1] and roles["E"] == (a[0], 1)
    return ranks and is_turned(site, b[0], a[1]) is not None


RECIPE = Recipe(
    name="adalora",
    formula="W' = W + k B (A * E) / (r + 1e-5)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    flipped=flipped,
    scaled=scaled,
    elementwise=frozenset("E"),
)
