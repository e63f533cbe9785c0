"""W' = W * l, along the outputs or along the inputs.

W   base     (out, in), (in, out) in a Conv1D of transformers, or (out, in, k...)
l   factor   (out, 1) for an ordinary target, (1, in) for a feed-forward one; (1, out, 1...) and (1, in, 1...) over a
             convolution

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper" (2022), section 3.3; PEFT
tuners/ia3/layer.py Linear.merge, _ConvNd.merge.
"""

from math import prod

from lora_check.recipes._ia3 import METHOD
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """l as a column, one number for each row, or as a row, one for each column."""
    from lora_check.functions import moved

    vector, (rows, *rest) = factors["l"].reshape(-1), site.shape
    if _by_rows(site):
        return {"column": vector.reshape(rows, 1)}
    kernel = prod(rest[1:])
    return {"row": moved(vector, lambda x: x.repeat_interleave(kernel).reshape(1, -1))}


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """(W * l)[rows]."""
    return w * (factors["column"][rows] if "column" in factors else factors["row"])


def _by_rows(site: Site) -> bool:
    length = site.roles["l"][1]
    if len(site.shape) > 2:
        return length == site.shape[0] and (length != site.shape[1] or not site.settings.get("feedforward"))
    outputs = length == 1
    return outputs != bool(site.in_out)


def fits(site: Site) -> bool:
    """A vector as long as one axis of the weight, in the shape that says which."""
    if set(site.roles) != {"l"} or site.leaf != "weight" or len(site.shape) < 2:
        return False
    vector, shape = site.roles["l"], site.shape[::-1] if site.in_out else site.shape
    if len(shape) == 2:
        return vector in ((shape[0], 1), (1, shape[1]))
    return len(vector) == len(shape) and prod(vector) == vector[1] and vector[1] in shape[:2]


RECIPE = Recipe(
    name="ia3", formula="W' = W * l", method=METHOD, fits=fits, prepare=prepare, apply=apply, elementwise=frozenset("l")
)
