"""W'[i, :] = S[j, :] for the j-th entry i of token_indices; every other row is W's.

W   base    (vocab, dim)
S   saved   (tokens, dim), stored as `trainable_tokens_delta`; despite that name its rows replace, they do not add

The tuner of that name. The file of a model whose head is tied holds the rows twice, and the head follows. Source: PEFT
tuners/trainable_tokens/layer.py TrainableTokensLayer.merge.
"""

from lora_check.recipes._token_rows import are_rows, replace
from lora_check.types import Method, Recipe

METHOD = Method(name="TRAINABLE_TOKENS", roles={"trainable_tokens_delta": "rows"}, keys=frozenset({"token_indices"}))

RECIPE = Recipe(name="trainable-tokens", formula="W'[i] = S[j]", method=METHOD, fits=are_rows, replace=replace)
