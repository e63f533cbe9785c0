"""LC212 vocabulary-contradicts-config

What it is
vocab_size in MERGED's config.json is not the number of rows of its embedding, though in BASE the two agree. Loaders
build the model by the configuration and then refuse the tensor, or cut it.

How it happens
Tokens were added and the embedding resized before training; the merge was saved with the base's configuration.
The configuration of a resized model was copied beside an embedding that was not.

How it is told
vocab_size, of the text part where there is one, against the rows of the input embedding.

Evidence
vocab_size, rows: the two numbers.

What to do
Set vocab_size in MERGED's config.json to the number of rows of the embedding.

Seen in
hiyouga/LlamaFactory#3125, hiyouga/LlamaFactory#5262
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.faults._configs import said
from lora_check.faults._findings import found
from lora_check.types import Finding, Plan, PlanFault, TensorMeta, Verdict

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding where the two differ, and do not in BASE."""
    place = _disagreement(plan.merged_config, plan.merged_metas)
    if place is None or _disagreement(plan.base_config, plan.base_metas) is not None:
        return ()
    name, size, rows = place
    message = f"{name} has {rows} rows, and vocab_size in MERGED's config.json is {size}"
    return (found(FAULT, message, [name], vocab_size=size, rows=rows),)


def _disagreement(config: Mapping[str, Any], metas: Mapping[str, TensorMeta]) -> tuple[str, int, int] | None:
    """The embedding, vocab_size and its rows, where they differ and there is one embedding only."""
    size = said(config, "vocab_size")
    names = [name for name in metas if name.removesuffix(".weight").rsplit(".", 1)[-1] in EMBEDDINGS]
    if not isinstance(size, int) or len(names) != 1 or len(metas[names[0]].shape) != 2:
        return None
    rows = metas[names[0]].shape[0]
    return (names[0], size, rows) if rows != size else None


FAULT = PlanFault(
    code="LC212",
    name="vocabulary-contradicts-config",
    severity="warning",
    summary="an embedding with another number of rows than vocab_size",
    help="set vocab_size in MERGED's config.json to the number of rows of the embedding",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M35",),
)
