"""How large LoRA adapters of given ranks and targets are, before there is one: counts from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lora_check.adapters.config import parse_config
from lora_check.errors import InputError, UsageError
from lora_check.inspection.attach import Attached, Parameter, attach, factors_of, targeted
from lora_check.inspection.model import Model, Shape, demand_known

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
"""dtype -> what safetensors calls it, and its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The targets of one name and one shape; r (in + out) numbers each."""

    family: str
    kind: str
    wide: int
    out: int
    modules: int

    @property
    def for_each_rank(self) -> int:
        """How many numbers one more rank takes."""
        return self.modules * (self.wide + self.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """An adapter of one rank; bytes are those of its numbers, file_bytes those of adapter_model.safetensors."""

    rank: int
    parameters: int
    bytes: Mapping[str, int]
    file_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What each target adds, and what each rank comes to; `full` is how many numbers full fine-tuning trains."""

    full: int
    targets: tuple[Target, ...]
    ranks: tuple[Prediction, ...]


def predict(model: Model, targets: str | Sequence[str], ranks: Sequence[int]) -> Predicted:
    """The sizes of adapters that do not exist yet.

    targets  as PEFT's target_modules: names, one pattern, or "all-linear"
    raises   UsageError: no module has such a name, or what has it is no layer that LoRA can be laid over
    """
    groups = tuple(_groups(model, targets))
    attached = {rank: _attached(model, targets, rank) for rank in ranks}
    return Predicted(
        full=model.size,
        targets=groups,
        ranks=tuple(_prediction(rank, one.trained) for rank, one in attached.items()),
    )


def file_size(tensors: Mapping[str, Shape], dtype: str) -> int:
    """Bytes of a safetensors file as PEFT writes it: the length of the header, the header, the numbers.

    The header is compact JSON, sorted by name where there is one dtype, filled up to a multiple of 8.
    Source: safetensors, README, "Format".
    """
    code, width = DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in sorted(tensors):
        end = start + width * prod(tensors[name])
        entries[name] = {"dtype": code, "shape": list(tensors[name]), "data_offsets": [start, end]}
        start = end
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (header + 7) // 8 * 8 + start


def _prediction(rank: int, trained: Sequence[Parameter]) -> Prediction:
    tensors = {one.saved: one.shape for one in trained}
    count = sum(prod(shape) for shape in tensors.values())
    return Prediction(
        rank=rank,
        parameters=count,
        bytes={dtype: count * width for dtype, (_, width) in DTYPES.items()},
        file_bytes={dtype: file_size(tensors, dtype) for dtype in DTYPES},
    )


def _attached(model: Model, targets: str | Sequence[str], rank: int) -> Attached:
    return attach(model, parse_config(_raw(targets, rank), "--targets"))


def _raw(targets: str | Sequence[str], rank: int) -> dict[str, Any]:
    named = targets if isinstance(targets, str) else list(targets)
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": named, "init_lora_weights": True}


def _groups(model: Model, targets: str | Sequence[str]) -> list[Target]:
    found = targeted(model, parse_config(_raw(targets, 1), "--targets"))
    unmet = [] if isinstance(targets, str) else [one for one in targets if not _ends(found, one)]
    if unmet or not found:
        known = dict.fromkeys(module.rsplit(".", 1)[-1] for module, kind in model.kinds.items() if kind != "other")
        raise UsageError(
            f"no module of {model.location} is called {unmet[0] if unmet else targets}",
            hint=f"its layers are called: {', '.join(known) or 'nothing that is known'}",
        )
    counted: dict[tuple[str, str, int, int], int] = {}
    for module in found:
        key = (module.rsplit(".", 1)[-1], *_sides(model, module))
        counted[key] = counted.get(key, 0) + 1
    return [
        Target(family=family, kind=kind, wide=wide, out=out, modules=count)
        for (family, kind, wide, out), count in counted.items()
    ]


def _sides(model: Model, module: str) -> tuple[str, int, int]:
    """What the module is, how many numbers A has for each rank, and how many B has."""
    try:
        kind, weight = demand_known(model, module), model.weight(module)
    except InputError as error:
        raise UsageError(error.message, hint=error.hint) from error
    assert weight is not None, module
    first, second = factors_of(kind, weight, 1).values()
    return kind, prod(first), prod(second)


def _ends(modules: Sequence[str], name: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)
