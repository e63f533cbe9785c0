"""A tied output head lies in the file as the input embedding.

transformers leaves `lm_head.weight` (and its likes) out of a file whose configuration ties it to the embedding; what is
asked of the head is then true of the embedding. The decoder bias of BERT-like heads is an alias of the head's own bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.types import Layout, TensorMeta

HEADS = ("lm_head", "embed_out", "output_embedding", "predictions.decoder", "cls.predictions.decoder")
TIED_BY_DEFAULT = ("predictions.decoder",)
ALIASES = ("predictions.decoder.bias",)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")


def resolve(name: str, names: Mapping[str, TensorMeta], config: Mapping[str, Any]) -> str | None:
    """The one embedding of `names`, when `name` is the weight of a head that the configuration may tie to it."""
    if name.endswith(ALIASES):
        alias = name.replace(".decoder.bias", ".bias")
        return alias if alias in names else None
    module = name.removesuffix(".weight")
    if module == name or not module.endswith(HEADS) or config.get("tie_word_embeddings") is False:
        return None
    found = [one for one in names if one.removesuffix(".weight").rsplit(".", 1)[-1] in EMBEDDINGS]
    return found[0] if len(found) == 1 else None


def drops(meta: TensorMeta, config: Mapping[str, Any]) -> bool:
    """True for a head that a model of this configuration ties: a save leaves it out, a load takes the embedding."""
    if meta.name.endswith(ALIASES):
        return True
    module = meta.name.removesuffix(".weight")
    if module == meta.name or not module.endswith(HEADS):
        return False
    return bool(config.get("tie_word_embeddings", module.endswith(TIED_BY_DEFAULT) and bool(config)))


LAYOUT = Layout(name="tied-head", resolve=resolve, drops=drops)
