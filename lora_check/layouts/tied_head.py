"""A tied output head lies in the file as the input embedding.

transformers leaves `lm_head.weight` (and its likes) out of a file whose configuration ties it to the embedding; what is
asked of the head is then true of the embedding. The decoder bias of BERT-like heads is an alias of the head's own bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.types import Layout, TensorMeta

HEADS = ("lm_head", "embed_out", "output_embedding", "predictions.decoder", "cls.predictions.decoder")
TIED_BY_DEFAULT = ("predictions.decoder.weight",)
ALIASES = ("predictions.decoder.bias",)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")


def resolve(name: str, names: Mapping[str, TensorMeta], config: Mapping[str, Any]) -> str | None:
    """The one embedding of `names` for a head that the configuration may tie to it, and the other way round."""
    if name.endswith(ALIASES):
        alias = name.replace(".decoder.bias", ".bias")
        return alias if alias in names else None
    if config.get("tie_word_embeddings") is False:
        return None
    wanted = _is_embedding if _is_head(name) else _is_head if _is_embedding(name) else None
    found = [one for one in names if wanted is not None and wanted(one)]
    return found[0] if len(found) == 1 else None


def _is_head(name: str) -> bool:
    return name.endswith(tuple(f"{head}.weight" for head in HEADS)) and not name.startswith("base_model.")


def _is_embedding(name: str) -> bool:
    return name.removesuffix(".weight").rsplit(".", 1)[-1] in EMBEDDINGS and name.endswith(".weight")


def drops(meta: TensorMeta, config: Mapping[str, Any]) -> bool:
    """True for a head that a model of this configuration ties: a save leaves it out, a load takes the embedding."""
    if meta.name.endswith(ALIASES):
        return True
    default = bool(config) and meta.name.endswith(TIED_BY_DEFAULT)
    return _is_head(meta.name) and bool(config.get("tie_word_embeddings", default))


LAYOUT = Layout(name="tied-head", resolve=resolve, drops=drops)
