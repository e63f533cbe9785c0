"""W' = V (m / |V|_column),   V = W + s (B A)^T.

W   base        (vocab, dim)
A   factor      (r, vocab), stored as `lora_embedding_A`
B   factor      (dim, r), stored as `lora_embedding_B`
m   magnitude   (dim,): one for each column

Source: PEFT tuners/lora/variants.py DoraEmbeddingVariant.merge_safe.
"""

from lora_check.recipes._dora import by_columns, moved
from lora_check.recipes._low_rank import is_embedding
from lora_check.types import Factors, Numbers, Recipe, Site


def product(factors: Factors, rows: slice) -> Numbers:
    """(B A)^T[rows]."""
    return factors["embedding_A"].T[rows] @ factors["embedding_B"].T


def fits(site: Site) -> bool:
    """A pair of embedding factors with a magnitude."""
    return (
        set(site.roles) == {"embedding_A", "embedding_B", "m"}
        and is_embedding(site)
        and site.roles["m"] == (site.shape[1],)
    )


RECIPE = Recipe(
    name="dora-embedding",
    formula="W' = (W + s (B A)^T) m/|W + s (B A)^T|",
    fits=fits,
    product=product,
    apply=by_columns,
    columns=moved,
)
