"""W'[:, j] = W[:, j] R_j^T for each block j of inputs.

W   base      (out, in), or a convolution flattened to (out, in k...)
Q   factor    (blocks, b (b - 1) / 2), stored as `oft_R.weight`: the upper triangles, row by row, of skew b x b matrices;
              one block serves all with block_share
R   rotation  (I - Q) (I + Q)^-1, or its Neumann series I + 2 Q + 2 Q^2 + ... + Q^(t-1)

With coft each triangle is first shortened to the norm eps / sqrt(blocks). The last coefficient of the series was 2 in
PEFT 0.16 and 0.17. Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (2023), eq. 5;
PEFT tuners/oft/layer.py OFTRotationModule.get_weight, Linear.merge.
"""

from math import prod

from lora_check.recipes._oft import METHOD, block_size, older, rotations
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The transposed rotations (blocks, b, b), or (1, b, b) where one is shared."""
    return {"turned": rotations(factors["Q"], site).mT}


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """W[rows] with each block of columns turned."""
    from lora_check.functions import moved

    turned = factors["turned"]
    size = int(turned.shape[-1])
    blocks = moved(w, lambda x: x.reshape(x.shape[0], -1, size).transpose(0, 1))
    return moved(blocks @ turned, lambda x: x.transpose(0, 1).reshape(x.shape[1], -1))


def fits(site: Site) -> bool:
    """Triangles of blocks that together are as wide as the weight."""
    if set(site.roles) != {"Q"} or site.leaf != "weight" or len(site.shape) < 2:
        return False
    blocks, elements = site.roles["Q"]
    size, width = block_size(elements), prod(site.shape[1:])
    return size > 1 and width % size == 0 and (blocks * size == width or (blocks == 1 and site.settings["share"]))


RECIPE = Recipe(
    name="oft",
    formula="W' = W R^T",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    releases={"PEFT 0.16 and 0.17": older},
)
