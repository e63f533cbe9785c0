"""Tensors that a model class rebuilds, or has no place for.

Position ids, rotary frequencies and causal masks were saved by old releases of transformers and are computed by newer
ones; a pooler lies in the pretraining file of a BERT-like model and in none of its heads that read every token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_check.types import Layout, TensorMeta

BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias)$")
MASK = re.compile(r"(^|\.)attn\.bias$")
POOLER = re.compile(r"(^|\.)pooler(\.|$)")
WITHOUT_POOLER = ("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "LMHeadModel")


def drops(meta: TensorMeta, config: Mapping[str, Any]) -> bool:
    """True for buffers, for square masks, and for the pooler where the class of `config` has none."""
    if BUFFERS.search(meta.name):
        return True
    if MASK.search(meta.name):
        return len(meta.shape) == 4 and meta.shape[:2] == (1, 1)
    classes = config.get("architectures") or ()
    return bool(POOLER.search(meta.name)) and any(str(one).endswith(WITHOUT_POOLER) for one in classes)


LAYOUT = Layout(name="rebuilt", drops=drops)
