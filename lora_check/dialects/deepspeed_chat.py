"""DeepSpeed-Chat: two parameters beside the weight of each layer, alone or in a state dict of the whole model

    <module path>.lora_right_weight (in, r), .lora_left_weight (r, out)

W' = W + s (right left)^T with s = lora_scaling / lora_dim. The file tells no scale: adapter_config.json beside it must
have `lora_scaling` (1 unless the code was changed). Derived code has the two names the other way round, left (in, r)
and right (r, out): the smaller of the two sizes that fit together is r, in all layers alike. What else the file
carries replaces BASE's tensors.

Source: microsoft/DeepSpeedExamples applications/DeepSpeed-Chat, training/utils/module/lora.py LinearLayer_LoRA
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.dialects._shared import Shape, modules_of, number, scales, whole
from lora_check.types import Adapter, AdapterConfig, Checkpoint, Dialect, Part, View

KNOWN = frozenset({"lora_dim", "lora_droppout", "lora_dropout", "lora_module_name", "lora_scaling"})
HINT = 'write {"lora_scaling": 1} into adapter_config.json beside the file, or the number that it was trained with'
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>right|left)_weight")


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Factors called right and left."""
    return any(_FACTOR.fullmatch(name) for name in names)


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Parse the configuration given beside the file, and the names; headers only.

    raises   AdapterConfigError: no lora_scaling
    """
    scaling = number(raw, "lora_scaling", checkpoint.location, HINT)
    factors = {name: match for name in checkpoint.metas() if (match := _FACTOR.fullmatch(name))}
    unknown = sorted(key for key, value in raw.items() if value and key not in KNOWN)
    plain = Adapter(
        config=AdapterConfig(
            method="LORA",
            rank=1,
            alpha=scaling,
            producer="deepspeed-chat",
            unsupported=tuple(f"the configuration key {key!r} is not known to this version" for key in unknown),
        ),
        checkpoint=checkpoint,
        dialect="deepspeed-chat",
        parts=(
            *(Part(tensor=name, module=match["module"], role=match["side"]) for name, match in factors.items()),
            *whole(name for name in checkpoint.metas() if name not in factors),
        ),
    )
    return _oriented(plain, raw.get("lora_dim"))


def _oriented(adapter: Adapter, dim: Any) -> Adapter:
    """right and left as A and B, whichever of them takes the inputs, with r and the scale."""
    metas = adapter.checkpoint.metas()
    pairs = {
        module: (metas[roles["right"].tensor].shape, metas[roles["left"].tensor].shape)
        for module, roles in modules_of(adapter).items()
        if {"right", "left"} <= roles.keys()
    }
    ways = [way for way in ("right", "left") if all(_rank(*pair, way) for pair in pairs.values())]
    if len(ways) != 1:
        reason = "which of its factors takes the inputs cannot be told from their shapes"
        return replace(adapter, refused=dict.fromkeys(pairs, reason))
    ranks = {module: _rank(*pair, ways[0]) for module, pair in pairs.items()}
    roles = {ways[0]: "A", "left" if ways[0] == "right" else "right": "B"}
    return replace(
        adapter,
        parts=tuple(
            replace(part, role=roles[part.role], view=View(transposed=True)) if part.role in roles else part
            for part in adapter.parts
        ),
        scales=scales({module: (adapter.config.alpha, rank) for module, rank in ranks.items()}),
        refused={
            module: f"the configuration says lora_dim = {dim}, its factors have {rank}"
            for module, rank in ranks.items()
            if dim is not None and dim != rank
        },
    )


def _rank(right: Shape, left: Shape, first: str) -> int:
    """r, if the factor called `first` takes the inputs: the size that both share; 0, if it cannot be that one."""
    if len(right) != 2 or len(left) != 2:
        return 0
    inner = {"right": (right[1], left[0]), "left": (left[1], right[0])}
    shared = {way: pair[0] for way, pair in inner.items() if pair[0] == pair[1]}
    other = shared.get("left" if first == "right" else "right")
    return shared.get(first, 0) if other is None or shared.get(first, other) < other or first not in shared else 0


DIALECT = Dialect(name="deepspeed-chat", recognises=recognises, read=read, needs_config=False)
