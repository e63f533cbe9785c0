"""W'[:, j] = W[:, j] R_j^T for each block j of inputs.

W   base      (out, in), or a convolution flattened to (out, in k...)
Q   factor    (blocks, b (b - 1) / 2), stored as `oft_R.weight`: the upper triangles, row by row, of skew matrices
              (b, b); one serves all with block_share
R   rotation  (I - Q) (I + Q)^-1, or its Neumann series I + 2 Q + 2 Q^2 + ... + Q^(t-1)

With coft each triangle is first shortened to the norm eps / sqrt(blocks). The last coefficient of the series was 2 in
PEFT 0.16 and 0.17. Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (2023), eq. 5;
PEFT tuners/oft/layer.py OFTRotationModule.get_weight, Linear.merge.
"""

from lora_check.recipes._oft import METHOD, are_triangles, older, rotations, turned_columns
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The transposed rotations (blocks, b, b), or (1, b, b) where one is shared."""
    return {"turn": hand.keep(rotations(factors["Q"], site)).mT}


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """W[rows] with each block of columns turned."""
    return turned_columns(w, factors["turn"])


def fits(site: Site) -> bool:
    """Triangles over the inputs of a weight."""
    plain = set(site.roles) == {"Q"} and site.leaf == "weight" and len(site.shape) > 1
    return plain and are_triangles(site.roles["Q"], site)


RECIPE = Recipe(
    name="oft",
    formula="W' = W R^T",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    releases={"PEFT 0.16 and 0.17": older},
)
