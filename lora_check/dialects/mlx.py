"""mlx-lm: adapters.safetensors or adapters.npz, and adapter_config.json with the arguments of the training

    <module path>.lora_a (in, r), .lora_b (r, out), .m (out,) for DoRA
    ....switch_mlp.<name>.lora_a (experts, r, in) or (experts r, in), .lora_b (experts, out, r)

W' = W + scale (a b)^T, `scale` as `lora_parameters` has it, not divided by r; `fine_tune_type: full` is whole tensors.
load_adapters reads `lora_parameters`, `num_layers` and `fine_tune_type` and nothing else, so no other key can change a
number. Until mid-2024 scale was multiplied with alpha / r, and the number of layers was called `lora_layers`.

Source: mlx-lm mlx_lm/tuner/lora.py, dora.py and utils.py load_adapters; ml-explore/mlx-examples#982
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.dialects._experts import are_stacked, one_of, side_by_side
from lora_check.dialects._shared import EMBEDDINGS, embedded, modules_of, number, scales, whole
from lora_check.errors import AdapterConfigError
from lora_check.links import lookup
from lora_check.types import Adapter, AdapterConfig, Checkpoint, Dialect, Part, View

PARAMETERS = "lora_parameters"
KNOWN = frozenset({"alpha", "dropout", "keys", "rank", "scale"})
SINCE_SCALE_ALONE = ("fine_tune_type", "num_layers")
"""Keys that releases write which multiply by `scale` alone."""

_FACTOR = re.compile(r"(?P<module>.+(?<!\.weight))\.(?P<factor>lora_a|lora_b)")
_STACKED = ".switch_mlp."
_EXPERTS = {"gate_proj": ("gate_proj", "w1"), "down_proj": ("down_proj", "w2"), "up_proj": ("up_proj", "w3")}


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Factors whose names end in lora_a and lora_b, or a configuration of mlx-lm for whole tensors."""
    return config.get("fine_tune_type") == "full" or any(_FACTOR.fullmatch(name) for name in names)


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Parse configuration and names; headers only.

    raises   AdapterConfigError: no lora_parameters, or no scale in it
    """
    plain = AdapterConfig(method="LORA", rank=1, alpha=1, producer="mlx-lm", base_name=str(raw.get("model") or ""))
    if raw.get("fine_tune_type") == "full":
        return Adapter(config=plain, checkpoint=checkpoint, dialect="mlx", parts=whole(checkpoint.metas()))
    said = raw.get(PARAMETERS)
    if not isinstance(said, Mapping):
        message = (
            f"adapter: the configuration of {checkpoint.location} has no {PARAMETERS}, and the scale cannot be known"
        )
        raise AdapterConfigError(message, hint="give the folder with the adapter_config.json that mlx-lm wrote")
    scale = number(said, "scale", checkpoint.location, "give the folder with the adapter_config.json that mlx-lm wrote")
    parts = tuple(_parts(checkpoint))
    used = {part.tensor for part in parts}
    adapter = Adapter(
        config=replace(plain, dora=any(part.role == "m" for part in parts), unsupported=tuple(_reasons(raw, said))),
        checkpoint=checkpoint,
        dialect="mlx",
        parts=parts,
        orphans=tuple(name for name in checkpoint.metas() if name not in used),
    )
    return embedded(_scaled(adapter, scale), lambda module: module.rpartition(".")[2] in EMBEDDINGS)


def bind(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Cut the factors of stacked experts, where BASE keeps each expert as a module of its own."""
    parts: list[Part] = []
    told, refused = dict(adapter.scales), dict(adapter.refused)
    for module, roles in modules_of(adapter).items():
        names = _experts(module, base) if _STACKED in module else []
        shapes = [adapter.checkpoint.metas()[roles[role].tensor].shape for role in "AB" if role in roles]
        fits = len(shapes) == len(roles) == 2 and are_stacked(shapes[0], shapes[1]) and shapes[1][0] == len(names)
        for expert, name in enumerate(names):
            views = one_of(expert, shapes[0], shapes[1]) if fits else {}
            parts += [replace(part, module=name, view=views.get(role)) for role, part in roles.items()]
            told |= {name: adapter.scales[module]} if module in adapter.scales else {}
            refused |= {} if fits else {name: f"{shapes} are not the factors of {len(names)} experts"}
        parts += [] if names else roles.values()
    return replace(adapter, parts=tuple(parts), scales=told, refused=refused)


def _parts(checkpoint: Checkpoint) -> Iterator[Part]:
    metas = checkpoint.metas()
    for name in metas:
        match = _FACTOR.fullmatch(name)
        module = match["module"] if match else name.removesuffix(".m")
        if match:
            yield Part(
                tensor=name, module=module, role=match["factor"][-1].upper(), view=_view(module, name, checkpoint)
            )
        elif module != name and f"{module}.lora_a" in metas:
            yield Part(tensor=name, module=module, role="m")


def _view(module: str, name: str, checkpoint: Checkpoint) -> View | None:
    """Matrices turned over; those of experts side by side."""
    metas = checkpoint.metas()
    a, b = (metas[key].shape if (key := f"{module}.lora_{one}") in metas else () for one in "ab")
    if are_stacked(a, b):
        return side_by_side(a, b)[name[-1].upper()]
    return View(transposed=True) if len(metas[name].shape) == 2 else None


def _reasons(raw: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[str]:
    """What of the configuration could change a number and is not known."""
    for key in sorted(said.keys() - KNOWN):
        yield f"the key {key!r} of {PARAMETERS} is not known to this version"
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        yield f"fine_tune_type {kind!r} is not known to this version"
    multiplied = said.get("alpha") is not None and said.get("alpha") != said.get("rank")
    if multiplied and not any(key in raw for key in SINCE_SCALE_ALONE):
        yield "releases of mlx-lm up to mid-2024 multiplied scale by alpha / rank, later ones do not, and none is named"


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    """s = scale, as alpha / r with the r that the factors have."""
    metas = adapter.checkpoint.metas()
    shapes = {part.module: metas[part.tensor].shape for part in adapter.parts if part.role == "B"}
    ranks = {module: shape[-1] if len(shape) == 3 else shape[0] for module, shape in shapes.items() if shape}
    return replace(adapter, scales=scales({module: (scale * rank, rank) for module, rank in ranks.items()}))


def _experts(module: str, base: Checkpoint) -> list[str]:
    """The modules of BASE that a stack of experts was made of; none, if BASE keeps the stack."""
    if lookup(f"{module}.weight", base.metas(), base.config):
        return []
    path, _, leaf = module.partition(_STACKED)
    for own in _EXPERTS.get(leaf, ()):
        names: list[str] = []
        while f"{path}.experts.{len(names)}.{own}.weight" in base.metas():
            names.append(f"{path}.experts.{len(names)}.{own}")
        if names:
            return names
    return []


DIALECT = Dialect(name="mlx", recognises=recognises, read=read, bind=bind)
