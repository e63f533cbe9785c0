"""W' = W + s (B A)^T.

W   base     (vocab, dim)
A   factor   (r, vocab), stored as `lora_embedding_A`
B   factor   (dim, r), stored as `lora_embedding_B`

PEFT stores the delta in the weight's dtype before it adds it, with safe_merge and without.
Source: PEFT tuners/lora/layer.py Embedding.get_delta_weight, Embedding.merge.
"""

from lora_check.recipes._low_rank import is_embedding
from lora_check.types import Factors, Numbers, Recipe, Site


def product(factors: Factors, rows: slice) -> Numbers:
    """(B A)^T[rows]."""
    return factors["embedding_A"].T[rows] @ factors["embedding_B"].T


def flipped(factors: Factors, rows: slice) -> Numbers:
    """(B A)[rows]: only a square embedding has room for this mistake."""
    return factors["embedding_B"][rows] @ factors["embedding_A"]


def fits(site: Site) -> bool:
    """A pair of embedding factors."""
    return set(site.roles) == {"embedding_A", "embedding_B"} and is_embedding(site)


RECIPE = Recipe(
    name="lora-embedding", formula="W' = W + s (B A)^T", fits=fits, product=product, flipped=flipped, stored=True
)
