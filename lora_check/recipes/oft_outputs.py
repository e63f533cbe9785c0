"""W'[j] = R_j^T W[j] for each block j of outputs.

W   base      (out, in), or a convolution flattened to (out, in k...)
X   factor    (blocks, b, b), stored as `oft_r`; one block serves all with block_share
R   rotation  (I - S) (I + S)^-1 with S = (X - X^T) / 2

What PEFT 0.7 to 0.13 wrote, and no later release reads. Where b does not divide the outputs, the rows and columns of
the last R that lie beyond them are left out. With coft each X is first shortened to the norm eps b^2 / sqrt(blocks).
Source: PEFT 0.12 tuners/oft/layer.py OFTLayer.get_delta_weight, OFTLayer.merge.
"""

from lora_check.recipes._mixed_rows import apply
from lora_check.recipes._oft import METHOD, skewed
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """R^T W, band by band."""
    from lora_check.functions import stacked_rows

    size, rows = site.roles["X"][-1], site.shape[0]
    rotation, w = _by_inverse(skewed(factors["X"], site.settings["eps"] * size**2)), factors["W"]
    bands = []
    for start in range(0, rows, size):
        left = min(size, rows - start)
        own = rotation[start // size if int(rotation.shape[0]) > 1 else 0]
        bands.append(own[:left, :left].T @ w[start : start + left])
    return {"made": stacked_rows(bands)}


def _by_inverse(skew: Numbers) -> Numbers:
    """(I - S) (I + S)^-1, the inverse made first."""
    from lora_check.functions import identity, solved

    eye = identity(skew)
    return (eye - skew) @ solved(eye + skew, eye)


def fits(site: Site) -> bool:
    """Whole matrices that together are at least as many rows as the weight has, and no block too many."""
    if set(site.roles) != {"X"} or site.leaf != "weight" or len(site.shape) < 2 or len(site.roles["X"]) != 3:
        return False
    (blocks, size, other), rows = site.roles["X"], site.shape[0]
    shared = blocks == 1 and site.settings["share"]
    return size == other and (size <= rows if shared else size == -(-rows // blocks))


RECIPE = Recipe(
    name="oft-outputs", formula="W' = R^T W", method=METHOD, fits=fits, prepare=prepare, apply=apply, reads="merged"
)
