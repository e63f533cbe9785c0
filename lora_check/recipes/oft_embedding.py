"""W'[:, j] = W[:, j] R_j for each block j of the embedding's columns.

W   base      (vocab, dim)
Q   factor    (blocks, b (b - 1) / 2), stored as `oft_embedding_R.weight`: the upper triangles of skew b x b matrices
R   rotation  as in `oft`, which multiplies by its transpose

Source: PEFT tuners/oft/layer.py Embedding.merge, from 0.19 on.
"""

from lora_check.recipes._oft import METHOD, are_triangles, rotations, turned_columns
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The rotations (blocks, b, b), or (1, b, b) where one is shared."""
    return {"turn": hand.keep(rotations(factors["embedding_Q"], site))}


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """W[rows] with each block of columns turned."""
    return turned_columns(w, factors["turn"])


def fits(site: Site) -> bool:
    """Triangles over the columns of an embedding."""
    plain = set(site.roles) == {"embedding_Q"} and site.leaf == "weight" and len(site.shape) == 2
    return plain and are_triangles(site.roles["embedding_Q"], site)


RECIPE = Recipe(name="oft-embedding", formula="W' = W R", method=METHOD, fits=fits, prepare=prepare, apply=apply)
