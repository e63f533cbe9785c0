"""W' = s * W B_1^T ... B_N^T, each B_i = P_i diag(R_i1, R_i2, ...) P_i^T.

W   base      (out, in), or a convolution flattened to (out, in k k)
X   factor    (N, blocks, b, b), stored as `boft_R`, N the number of butterfly factors
s   factor    (out, 1), or (1, out) of a convolution, stored as `boft_s`
R   rotation  (I - S) (I + S)^-1 with S = (X - X^T) / 2, of each block
P   order     of the columns: of each 2^(i - 1) b columns, in groups of b / 2, the even groups first; P_1 is I. PEFT
              0.11 to 0.13 stored it, as `boft_P` (N, in, in)

PEFT multiplies the B with one another before they meet W, so that N > 1, which needs its CUDA extension, is not bit for
bit. Up to 0.13 it read a convolution as (in k k, out). Source: Liu et al., "Parameter-Efficient Orthogonal Finetuning
via Butterfly Factorization" (2024), section 5; PEFT tuners/boft/layer.py BOFTLayer.block_butterfly_perm,
Linear.get_delta_weight.
"""

from dataclasses import replace
from math import prod
from typing import Any

from lora_check.recipes import _mixed_rows
from lora_check.recipes._oft import cayley, skewed, turned_columns
from lora_check.types import Factors, Hand, LoadedStep, Method, Numbers, Recipe, Site

METHOD = Method(
    name="BOFT",
    roles={"boft_R": "X", "boft_s": "s", "boft_P": "P"},
    keys=frozenset({"bias", "boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor"}),
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The transposed rotations (N, blocks, b, b), the columns in the order of each P, and the scales as a column."""
    from lora_check.functions import middle

    x = factors["X"]
    turn = cayley(skewed(x.reshape(-1, *x.shape[2:]), 0.0)).mT
    orders = middle(factors["P"]).argmax(-1) if "P" in factors else _orders(*x.shape[:3])
    return {"turn": turn.reshape(*x.shape), "orders": orders, "s": factors["s"].reshape(-1, 1)}


def _orders(count: int, blocks: int, size: int) -> Any:
    """(N, in), which column comes where."""
    import torch

    columns = torch.arange(blocks * size)
    mixed = [columns.reshape(-1, 2**index, 2, size // 2).transpose(1, 2).reshape(-1) for index in range(1, count)]
    return torch.stack([columns, *mixed])


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """W[rows] with its columns turned by one factor after the other, times s."""
    from lora_check.functions import magnitude, resummed

    turn, orders = factors["turn"], factors["orders"]
    turned, count = _turned(w, turn, orders), int(turn.shape[0])
    if count > 1:
        # Products of sparse matrices fill up: a row of the last has 2^(N - 1) b elements.
        terms = int(turn.shape[-1]) * 2 ** (count - 1)
        turned = resummed(turned, terms, lambda: _turned(magnitude(w), magnitude(turn), orders))
    return turned * factors["s"][rows]


def _turned(w: Numbers, turn: Numbers, orders: Any) -> Numbers:
    """W B_1^T ... B_N^T: the columns put in order, turned, and put back."""
    for index, order in enumerate(orders):
        w = turned_columns(w[:, order.argsort()], turn[index])[:, order]
    return w


def fits(site: Site) -> bool:
    """Blocks that together are as wide as the weight, in a number that N factors can mix, and a scale for each row."""
    if set(site.roles) - {"P"} != {"X", "s"} or site.leaf != "weight" or len(site.shape) not in (2, 4):
        return False
    x, s, (outputs, *rest) = site.roles["X"], site.roles["s"], site.shape
    width = prod(rest)
    if len(x) != 4 or x[2] != x[3] or x[1] * x[2] != width or site.roles.get("P") not in (None, (x[0], width, width)):
        return False
    mixed = x[0] == 1 or (x[2] % 2 == 0 and x[1] % 2 ** (x[0] - 1) == 0)
    return mixed and s == ((outputs, 1) if len(site.shape) == 2 else (1, outputs))


def misread(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The formula over a convolution whose numbers are taken in the same order as (in k k, out)."""
    from lora_check.functions import moved

    w = factors["W"]
    read = moved(w, lambda x: x.reshape(-1, x.shape[0]).T)
    made = apply(read, None, prepare(factors, site, hand), None, slice(None), hand)
    return {"made": moved(made, lambda x: x.T.reshape(w.shape))}


def older(step: LoadedStep) -> LoadedStep:
    """The convolution of PEFT 0.11 to 0.13."""
    over_kernel = step.site is not None and len(step.site.shape) > 2
    return replace(step, recipe=MISREADING) if over_kernel else step


RECIPE = Recipe(
    name="boft",
    formula="W' = s * W B^T",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    elementwise=frozenset("sP"),
    releases={"PEFT 0.11 to 0.13": older},
)
MISREADING = replace(RECIPE, prepare=misread, apply=_mixed_rows.apply, reads="merged", releases={})
