"""W' = W + s kron(w1, w2).

W    base     (out1 out2, in1 in2) or (out1 out2, in1 in2, k...)
w1   factor   (out1, in1), stored as `lokr_w1`, or as `lokr_w1_a` (out1, r) times `lokr_w1_b` (r, in1)
w2   factor   (out2, in2, k...), stored as `lokr_w2`, or as `lokr_w2_a` (out2, r) times `lokr_w2_b` (r, in2 k...)
t2   factor   (r, r, k, k), stored as `lokr_t2`, of an effective convolution only: w2 is the sum over i and j of
              t2[i, j] w2_a[i] w2_b[j], with w2_a (r, out2) and w2_b (r, in2)
s    scale    alpha / r; PEFT 0.6 to 0.13 left it out, forward and merge alike

Over a one-dimensional convolution with an undivided w2 PEFT's Kronecker product pairs the axes of w1 with the last two
of w2, and lays the result over the weight as it comes. Source: Yeh et al., "Navigating Text-To-Image Customization"
(2024), section 3; PEFT tuners/lokr/layer.py LoKrLayer.get_delta_weight, make_kron.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from lora_check.recipes._lycoris import COMMON
from lora_check.types import Factors, Hand, LoadedStep, Method, Numbers, Recipe, Site

METHOD = Method(
    name="LOKR",
    roles={f"lokr_{factor}": factor for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    keys=COMMON,
    alpha="alpha",
)
WHOLE_FIRST, FIRST, CORE = {"w1"}, {"w1_a", "w1_b"}, {"w2_a", "w2_b", "t2"}

Shapes = Mapping[str, tuple[int, ...]]


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The halves, with axes of length 1 where the other has its own: row o is slow[o // n] * fast[o % n].

    n   how many rows `fast` has
    """
    from lora_check.functions import moved

    w1 = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
    w2 = _second(factors)
    if w2.ndim == 3:
        return {"slow": w2[:, :, None], "fast": moved(w1, lambda x: x[:, None, :, None])}
    return {"slow": w1[:, :, None], "fast": moved(w2, lambda x: x.reshape(len(x), 1, -1))}


def _second(factors: Factors) -> Numbers:
    if "w2" in factors:
        return factors["w2"]
    return _core(factors) if "t2" in factors else factors["w2_a"] @ factors["w2_b"]


def _core(factors: Factors) -> Numbers:
    """Sum over i, then j, of t2[i, j, k, l] w2_a[i, o] w2_b[j, c], as (o, c k l)."""
    from lora_check.functions import moved

    (i, j, *kernel), outputs = (int(size) for size in factors["t2"].shape), int(factors["w2_a"].shape[1])
    # Batches of one, for torch sums small ones in another order than a plain product, and its einsum makes batches.
    core = moved(factors["t2"], lambda x: x.permute(1, 2, 3, 0).reshape(1, -1, i))
    first = core @ factors["w2_a"][None]
    turned = moved(first, lambda x: x.reshape(j, *kernel, outputs).permute(3, 1, 2, 0).reshape(1, -1, j))
    second = turned @ factors["w2_b"][None]
    return moved(second, lambda x: x.reshape(outputs, *kernel, -1).permute(0, 3, 1, 2).reshape(outputs, -1))


def product(factors: Factors, rows: slice) -> Numbers:
    """kron(w1, w2)[rows], flattened to (rows, in k...)."""
    import torch

    index, size = torch.arange(rows.start, rows.stop), int(factors["fast"].shape[0])
    return (factors["slow"][index // size] * factors["fast"][index % size]).reshape(len(index), -1)


def fits(site: Site) -> bool:
    """Two halves, each whole or in factors, whose sizes multiply to those of the weight."""
    if site.leaf != "weight" or not 2 <= len(site.shape) <= 4:
        return False
    first, second = _first_shape(site.roles), _second_shape(site.roles, site.shape[2:])
    known = len(first) == 2 and len(second) == len(site.shape)
    return known and (first[0] * second[0], first[1] * second[1], *second[2:]) == site.shape


def _first_shape(roles: Shapes) -> tuple[int, ...]:
    """The shape of w1, whole or multiplied; nothing if there is none."""
    present = roles.keys() & (WHOLE_FIRST | FIRST)
    if present == WHOLE_FIRST:
        return roles["w1"]
    return _multiplied(roles["w1_a"], roles["w1_b"]) if present == FIRST else ()


def _second_shape(roles: Shapes, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of w2 over a weight with this kernel, whole, multiplied or put together; nothing if there is none."""
    present = roles.keys() - WHOLE_FIRST - FIRST
    if present == {"w2"}:
        return roles["w2"]
    if not present >= {"w2_a", "w2_b"}:
        return ()
    a, b = roles["w2_a"], roles["w2_b"]
    if present == {"w2_a", "w2_b"}:
        outputs, *inputs = _multiplied(a, b) or (0,)
        return (outputs, inputs[0] // prod(kernel), *kernel) if inputs and inputs[0] % prod(kernel) == 0 else ()
    # A one-dimensional kernel is saved as (k, 1).
    core = (a[0], b[0], *kernel, 1)[:4]
    return (a[1], b[1], *kernel) if present == CORE and len(a) == len(b) == 2 and roles["t2"] == core else ()


def _multiplied(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else ()


def unscaled(step: LoadedStep) -> LoadedStep:
    """The formula of PEFT 0.6 to 0.13: s is 1."""
    scale = step.scale and replace(step.scale, alpha=1.0, rank=1)
    return replace(step, scale=scale)


RECIPE = Recipe(
    name="lokr",
    formula="W' = W + s kron(w1, w2)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    releases={"PEFT 0.6 to 0.13": unscaled},
)
