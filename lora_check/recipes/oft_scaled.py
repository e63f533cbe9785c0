"""W'[:, j] = s * W[:, j] R_j^T for each block j of inputs.

W   base      (out, in), or a convolution flattened to (out, in k...)
X   factor    (blocks, b, b), stored as `oft_r`; one block serves all with block_share
s   factor    (out, 1), stored as `oft_s`
R   rotation  (I - S) (I + S)^-1 with S = (X - X^T) / 2

What PEFT 0.14 and 0.15 wrote, and no later release reads. With coft each X is first shortened to the norm
eps ceil(out / r)^2 / sqrt(blocks), r being the number of blocks that make up the inputs. Source: PEFT 0.15
tuners/oft/layer.py OFTLayer.get_delta_weight, Linear.merge.
"""

from math import ceil, prod

from lora_check.recipes._oft import METHOD, cayley, skewed, turned_columns
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The transposed rotations, and the scales."""
    blocks = prod(site.shape[1:]) // site.roles["X"][-1]
    eps = site.settings["eps"] * ceil(site.shape[0] / blocks) ** 2
    return {"turn": cayley(skewed(factors["X"], eps)).mT, "s": factors["s"]}


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """W[rows] with each block of columns turned, times s."""
    return turned_columns(w, factors["turn"]) * factors["s"][rows]


def fits(site: Site) -> bool:
    """Whole matrices over the inputs, and a scale for each output."""
    if set(site.roles) != {"X", "s"} or site.leaf != "weight" or len(site.shape) < 2 or len(site.roles["X"]) != 3:
        return False
    (blocks, size, other), width = site.roles["X"], prod(site.shape[1:])
    covers = blocks * size == width or (blocks == 1 and site.settings["share"] and width % size == 0)
    return size == other and covers and site.roles["s"] == (site.shape[0], 1)


RECIPE = Recipe(
    name="oft-scaled",
    formula="W' = s * W R^T",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    elementwise=frozenset("s"),
)
