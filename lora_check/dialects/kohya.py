"""kohya's sd-scripts and LyCORIS: one flat name for each module, and its alpha as a tensor beside the factors

    lora_<part>_<module path with underscores>.lora_down.weight | lora_up.weight | alpha
            part: unet, transformer, te, te1, te2, te3; also lycoris_<module path>
    ....hada_w1_a, hada_w1_b ... (LoHa), ....lokr_w1, lokr_w2_a ... (LoKr)

s = alpha / r; without the tensor `alpha` s is 1. No adapter_config.json is read, and of `__metadata__` rs_lora alone.
The underscores are undone with the names of BASE: what two of its modules could be called is left undecided.

Source: sd-scripts networks/lora.py, networks/merge_lora.py; LyCORIS lycoris/modules, lycoris/utils
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_check.dialects._components import modules_in
from lora_check.dialects._shared import laid_over, renamed, scales, single
from lora_check.types import Adapter, AdapterConfig, Checkpoint, Dialect, Part

ALPHA = "alpha"
FACTORS: Mapping[str, Mapping[str, str]] = {
    "LORA": {"lora_down.weight": "A", "lora_up.weight": "B"},
    "LOHA": {f"hada_{one}": one for one in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "LOKR": {f"lokr_{one}": one for one in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
REASONS = {
    "dora_scale": "tools differ in the axis and in the epsilon of the norm that dora_scale is divided by",
    "lora_mid.weight": "the product of a decomposed convolution with its core (lora_mid) is not recomputed",
}
RS_LORA = "rs_lora: releases of LyCORIS differ in whether the stored alpha already holds it"

_NAME = re.compile(r"(?P<key>(?:lora|lycoris)_[^.]+)\.(?P<leaf>.+)")
_KEY = re.compile(r"(?:lora|lycoris)_(?:(?P<part>unet|transformer|te[123]?)_)?(?P<module>.+)")
_KNOWN = {leaf for leaves in FACTORS.values() for leaf in leaves} | REASONS.keys()


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """A factor under a flat name."""
    matches = (_NAME.fullmatch(name) for name in names)
    return any(match["leaf"] in _KNOWN for match in matches if match)


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Group the tensors by module; the alphas are read, they are one number each.

    raises   AdapterConfigError: an alpha that is no number
    """
    modules, orphans = _grouped(checkpoint)
    kinds = {key: _method(leaves) for key, leaves in modules.items()}
    method = Counter(kind for kind in kinds.values() if kind in FACTORS).most_common(1)
    chosen = method[0][0] if method else "LORA"
    told = {key: _ingredients(checkpoint, leaves) for key, leaves in modules.items()}
    alpha, rank = next((told[key] for key, kind in kinds.items() if kind == chosen), (1.0, 1))
    return Adapter(
        config=AdapterConfig(
            method=chosen,
            rank=rank,
            alpha=alpha,
            producer="kohya",
            unsupported=(RS_LORA,) if _rs_lora(checkpoint) else (),
        ),
        checkpoint=checkpoint,
        dialect="kohya",
        parts=tuple(
            Part(tensor=tensor, module=key, role=FACTORS[chosen].get(leaf, leaf))
            for key, leaves in modules.items()
            for leaf, tensor in leaves.items()
            if leaf != ALPHA
        ),
        orphans=orphans,
        scales=scales(told),
        refused={key: _why(kind, chosen) for key, kind in kinds.items() if kind != chosen},
    )


def bind(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Put the dots back: the module of BASE whose name with underscores is the key's."""
    flat: dict[str, dict[str, list[str]]] = {}

    def found(key: str) -> Sequence[str]:
        """The modules of BASE that a key may name."""
        match = _KEY.fullmatch(key)
        part = (match["part"] if match else "") or ""
        if part not in flat:
            flat[part] = {}
            for name, modules in modules_in(base, part).items():
                flat[part].setdefault(name.replace(".", "_"), []).extend(modules)
        return tuple(dict.fromkeys(flat[part].get(match["module"], ()))) if match else ()

    shapes = {name.removesuffix(".weight"): meta.shape for name, meta in base.metas().items()}
    return laid_over(renamed(adapter, found), shapes)


def _grouped(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Key -> what follows it -> tensor; and the tensors that belong to no factors."""
    modules: dict[str, dict[str, str]] = {}
    orphans = []
    for name in checkpoint.metas():
        match = _NAME.fullmatch(name)
        if match:
            modules.setdefault(match["key"], {})[match["leaf"]] = name
        else:
            orphans.append(name)
    lone = [key for key, leaves in modules.items() if leaves.keys() == {ALPHA}]
    return modules, (*orphans, *(modules.pop(key)[ALPHA] for key in lone))


def _method(leaves: Mapping[str, str]) -> str:
    """The method whose factors these are; else what of them is not known."""
    others = leaves.keys() - {ALPHA}
    strange = sorted(others - {leaf for known in FACTORS.values() for leaf in known})
    if strange:
        return strange[0]
    return next((method for method, known in FACTORS.items() if others <= known.keys()), sorted(others)[0])


def _why(kind: str, chosen: str) -> str:
    if kind in FACTORS:
        return f"one file holds factors of {chosen} and of {kind}, and only the first are recomputed"
    return REASONS.get(kind, f"what LyCORIS does with {kind} is not recomputed")


def _ingredients(checkpoint: Checkpoint, leaves: Mapping[str, str]) -> tuple[float, int]:
    """Alpha and r of one module; r of a LoKr whose halves are both whole is what makes s 1."""
    metas = checkpoint.metas()
    inner = [leaf for leaf in ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if leaf in leaves]
    ranks = [metas[leaves[leaf]].shape[0] for leaf in inner if metas[leaves[leaf]].shape]
    if not ranks or ranks[0] < 1:
        return 1.0, 1
    return (single(checkpoint, leaves[ALPHA]) if ALPHA in leaves else float(ranks[0])), ranks[0]


def _rs_lora(checkpoint: Checkpoint) -> bool:
    """Whether the arguments of the training, as `__metadata__` keeps them, name rs_lora."""
    metadata: Mapping[str, str] = getattr(checkpoint, "metadata", {})
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return "rs_lora" in metadata["ss_network_args"]
    said = arguments.get("rs_lora") if isinstance(arguments, dict) else None
    return str(said).lower() not in ("none", "false", "0", "")


DIALECT = Dialect(name="kohya", recognises=recognises, read=read, bind=bind, needs_config=False)
