"""W' = W + s (w1_a w1_b) * (w2_a w2_b).

W          base     (out, in) or (out, in, k...)
w1_a, w2_a factor   (out, r), stored as `hada_w1_a`, `hada_w2_a`
w1_b, w2_b factor   (r, in k...), stored as `hada_w1_b`, `hada_w2_b`
t1, t2     factor   (r, r, k, k), of an effective convolution only: there each half is the sum over i and j of
                    t[i, j] a[i] b[j], with a (r, out) and b (r, in)
s          scale    alpha / r

`*` is elementwise. Source: Hyeon-Woo et al., "FedPara" (2022), prop. 2 and 3; PEFT tuners/loha/layer.py make_weight and
make_weight_cp, tuners/lycoris_utils.py LycorisLayer.merge.
"""

from math import prod

from lora_check.recipes._lycoris import COMMON
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site

METHOD = Method(
    name="LOHA",
    roles={f"hada_{factor}": factor for factor in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    keys=COMMON,
    alpha="alpha",
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The halves as pairs (out, ...) and (..., columns); the core of a convolution is multiplied into the second."""
    if "t1" not in factors:
        return factors
    return {
        **{f"w{half}_a": factors[f"w{half}_a"].T for half in (1, 2)},
        **{f"w{half}_b": _columns(factors[f"t{half}"], factors[f"w{half}_b"]) for half in (1, 2)},
    }


def _columns(core: Numbers, b: Numbers) -> Numbers:
    """Sum over j of t[i, j, k, l] b[j, c], as (i, c k l)."""
    from lora_check.functions import moved

    i, j, *kernel = (int(size) for size in core.shape)
    flat = moved(core, lambda x: x.permute(0, 2, 3, 1).reshape(-1, j)) @ b
    return moved(flat, lambda x: x.reshape(i, *kernel, -1).permute(0, 3, 1, 2).reshape(i, -1))


def product(factors: Factors, rows: slice) -> Numbers:
    """((w1_a w1_b) * (w2_a w2_b))[rows]."""
    return (factors["w1_a"][rows] @ factors["w1_b"]) * (factors["w2_a"][rows] @ factors["w2_b"])


def fits(site: Site) -> bool:
    """Two pairs of factors, with or without a core each, over a weight."""
    roles, shape = site.roles, site.shape
    if len(shape) < 2 or site.leaf != "weight":
        return False
    if set(roles) == {"w1_a", "w1_b", "w2_a", "w2_b"}:
        return all(_pair(roles[f"w{half}_a"], roles[f"w{half}_b"], shape) for half in (1, 2))
    cores = {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}
    return set(roles) == cores and len(shape) == 4 and all(_core(roles, half, shape) for half in (1, 2))


def _pair(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(a) == len(b) == 2 and a[1] == b[0] and (a[0], b[1]) == (shape[0], prod(shape[1:]))


def _core(roles: Factors, half: int, shape: tuple[int, ...]) -> bool:
    a, b, core = roles[f"w{half}_a"], roles[f"w{half}_b"], roles[f"t{half}"]
    pair = len(a) == len(b) == 2 and (a[1:], b[1:]) == (shape[:1], shape[1:2])
    return pair and core == (a[0], b[0], *shape[2:])


RECIPE = Recipe(
    name="loha",
    formula="W' = W + s (w1a w1b) * (w2a w2b)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
)
