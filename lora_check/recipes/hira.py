"""W' = W + W0 * (B A).

W    base     (out, in), (in, out) in a Conv1D of transformers and (vocab, dim) in an embedding with the product turned
              over, or a convolution (out, in, k...)
W0   base     the same, as the adapter found it
A    factor   (r, in) or (r, in, k...), stored as `hira_A`; of an embedding (r, vocab), `hira_embedding_A`
B    factor   (out, r) or (out, r, 1...), stored as `hira_B`; of an embedding (dim, r), `hira_embedding_B`

`*` is elementwise. PEFT rounds B A, the product with W0 and the sum to the model's dtype. Of several adapters it may
add up all B A first, and 0.20 multiplied W by 1 + B A: such merges are within the budget, not bit for bit. Source:
Huang et al., "HiRA" (2025), eq. 2; PEFT tuners/hira/layer.py HiraLayer._merge.
"""

from collections.abc import Mapping
from typing import Any

from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Whether the adapter is from PEFT 0.20, and may have been merged by it."""
    return {"older": str(raw.get("peft_version") or "").startswith("0.20")}


METHOD = Method(
    name="HIRA",
    roles={"hira_A": "A", "hira_B": "B", "hira_embedding_A": "embedding_A", "hira_embedding_B": "embedding_B"},
    keys=frozenset({"hira_dropout"}),
    settings=settings,
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The two matrices whose product has the shape of the weight, flattened as the weight is."""
    if "embedding_A" in factors:
        pair = factors["embedding_A"].T, factors["embedding_B"].T
    else:
        a, b = (factors[role].reshape(int(factors[role].shape[0]), -1) for role in "AB")
        pair = (a.T, b.T) if _turned(site) else (b, a)
    return {"left": pair[0], "right": pair[1], "older": site.settings["older"]}


def product(factors: Factors, rows: slice) -> Numbers:
    """(B A)[rows]."""
    return factors["left"][rows] @ factors["right"]


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """(W + W0 * B A)[rows]."""
    from lora_check.functions import middle, within

    found = factors["W"]
    added = hand.settle(found * hand.settle(delta))
    one_way = not factors["older"] and bool((middle(w) == middle(found)).all())
    return w + added if one_way else within(w + added, lambda: _apart(w, found, added, hand))


def _apart(w: Numbers, found: Numbers, added: Numbers, hand: Hand) -> Numbers:
    """How far apart the orders are: adapters one after the other, their sum first, or a product with 1 + B A.

    Let u and n be the relative and the absolute error of storing. The earlier steps left w = W0 + W0 D (1 + 2 u) within
    u |w|, this one adds W0 D' (1 + 2 u); the other orders round W0 (D + D') three times, or W0 (1 + D) once more. With
    |W0 D| at most |w - W0| + u |w| to first order, that is less than (1 + 1/16) u |w| + 8 u (|w - W0| + |added|) + 8 n
    (1 + |W0|).
    """
    from lora_check.functions import like, magnitude, storing_error

    relative, absolute = storing_error(hand.settle, w)
    own = magnitude(w) * ((1 + 1 / 16) * relative)
    moved = (magnitude(w - found) + magnitude(added)) * (8 * relative)
    return own + moved + (magnitude(found) + like(w, 1.0)) * (8 * absolute)


def fits(site: Site) -> bool:
    """A pair of one rank whose product has the shape of the weight, or of the weight turned over."""
    kind = "embedding_" if "embedding_A" in site.roles else ""
    if site.leaf != "weight" or set(site.roles) != {f"{kind}A", f"{kind}B"}:
        return False
    a, b, w = site.roles[f"{kind}A"], site.roles[f"{kind}B"], site.shape
    if not len(a) == len(b) == len(w) >= 2 or a[0] != b[1]:
        return False
    ones = (1,) * (len(w) - 2)
    straight = not kind and (b[0], *a[1:]) == w and b[2:] == ones
    return straight or (len(w) == 2 and (a[1], b[0]) == w)


def _turned(site: Site) -> bool:
    """Whether a plain weight is stored (in, out); a square one has to be told so."""
    if len(site.shape) != 2:
        return False
    pair = (site.roles["A"][1], site.roles["B"][0])
    return site.shape == pair and (pair[0] != pair[1] or bool(site.in_out))


RECIPE = Recipe(
    name="hira",
    formula="W' = W + W * (B A)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    apply=apply,
    reads="rows",
)
