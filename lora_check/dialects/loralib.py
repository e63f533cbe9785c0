"""loralib, the first LoRA: the factors are parameters of the layer, alone or in a state dict of the whole model

    <module path>.lora_A (r, in), .lora_B (out, r)          Embedding: lora_A (r, vocabulary), lora_B (dim, r)

No file of loralib tells alpha, which is an argument of each layer: adapter_config.json beside the file must have
`lora_alpha`, and `enable_lora` where layers are MergedLinear. What else the file carries replaces BASE's tensors.

Source: microsoft/LoRA loralib/layers.py, loralib/utils.py lora_state_dict
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.adapters.config import parse_config
from lora_check.dialects._groups import flags, spread
from lora_check.dialects._shared import EMBEDDINGS, embedded, number, rows, scales, whole
from lora_check.types import Adapter, Checkpoint, Dialect, Part

MASK = ".lora_ind"
"""A buffer of MergedLinear that says which outputs are enabled."""

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])")
_ADALORA = (".lora_E", ".ranknum")


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Factors that are parameters, no `.weight` after them, and no configuration of PEFT's."""
    found = any(_FACTOR.fullmatch(name) for name in names)
    return found and "peft_type" not in config and not any(name.endswith(_ADALORA) for name in names)


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Parse the configuration given beside the file, and the names; headers only.

    raises   AdapterConfigError: no lora_alpha, or a value that cannot be
    """
    number(raw, "lora_alpha", checkpoint.location)
    config, metas = parse_config(raw, checkpoint.location), checkpoint.metas()
    factors = {name: match for name in metas if (match := _FACTOR.fullmatch(name))}
    ranks = {match["module"]: rows(metas[name].shape) for name, match in factors.items() if match["role"] == "A"}
    told = scales({module: (float(config.alpha), rank) for module, rank in ranks.items()})
    plain = Adapter(
        config=replace(config, targets=(), producer="loralib"),
        checkpoint=checkpoint,
        dialect="loralib",
        parts=(
            *(Part(tensor=name, module=match["module"], role=match["role"]) for name, match in factors.items()),
            *whole(name for name in metas if name not in factors and not name.endswith(MASK)),
        ),
        scales={} if raw.get("r") is not None else told,
    )
    return embedded(plain, lambda module: module.rpartition(".")[2] in EMBEDDINGS)


def bind(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Lay the factors of some outputs over the whole layer, where the configuration enables some."""
    enabled = flags(adapter.config.raw.get("enable_lora"))
    return spread(adapter, base, enabled, groups=sum(enabled)) if enabled else adapter


DIALECT = Dialect(name="loralib", recognises=recognises, read=read, bind=bind, needs_config=False)
