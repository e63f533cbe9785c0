"""The change as an adapter: the factors of each matrix of low rank, written as PEFT writes them, whole or not at all.

MERGED says no more of the factors than its rounding left: what the adapter merges to differs from MERGED in a last
place here and there, and how often is measured with `replay`, the merge that a check recomputes.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_check.errors import UsageError
from lora_check.inferring.deltas import Delta, Factors, unweighed
from lora_check.inferring.floors import SPARE
from lora_check.inferring.line import Sight, inference, opened, seen
from lora_check.inferring.outcome import Change, Inference, Kind
from lora_check.inferring.refining import refined
from lora_check.inferring.spectrum import sketch
from lora_check.means import Progress
from lora_check.orientation import IN_OUT_MODELS
from lora_check.rounding import between_orders, half_cell, store
from lora_check.types import Checkpoint
from lora_check.work import one_thread
from lora_check.writing import workplace

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, WEIGHT = "base_model.model.", ".weight"
EMBEDDINGS = ("embed", "wte", "wpe", "shared")
"""Words of modules that look rows up: LoRA keeps other factors for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One matrix of the adapter, and how its merge differs from MERGED.

    a, b       factors (r, in) and (out, r), of s = 1
    differs    elements that the merge rounds to another number      elements   of how many
    outside    elements that no order of float32 operations can round to what MERGED holds
    residual   |W + B A, stored, - M|^2        energy   |M - W|^2
    """

    change: Change
    a: Tensor
    b: Tensor
    differs: int
    outside: int
    elements: int
    residual: float
    energy: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What was written.

    left_out   tensors that changed, and are in no factor
    """

    location: str
    ranks: tuple[int, ...]
    differs: int
    outside: int
    elements: int
    residual: float
    left_out: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """What was written, how close it comes, and what `report` will say of it."""
        counts = ", ".join(f"{rank} ({count})" for rank, count in Counter(self.ranks).most_common())
        share = 100 * self.differs / self.elements
        close = (
            f"its merge differs from MERGED in {share:.2g} % of {self.elements} elements, {self.outside} over budget"
        )
        left = f"; {len(self.left_out)} changed tensors are not in it" if self.left_out else ""
        told = [
            f"wrote {self.location}: {len(self.ranks)} modules, of rank {counts}, alpha = rank",
            f"{close}, in all by {self.residual:.2g} of the change itself{left}",
        ]
        return [*told, self.outlook]

    @property
    def outlook(self) -> str:
        """What `report BASE OUT MERGED` says."""
        if self.outside:
            return (
                "report BASE OUT MERGED will refute the modules where it is over budget: the rounding of MERGED is in "
                "the factors, and the adapter that was merged cannot be told more closely"
            )
        if self.left_out:
            return "report BASE OUT MERGED will verify the modules that are in it, and refute what else changed"
        return "report BASE OUT MERGED will verify it"

    def as_dict(self) -> dict[str, Any]:
        """Its place in the JSON."""
        return {
            "out": self.location,
            "modules": len(self.ranks),
            "ranks": {str(rank): count for rank, count in Counter(self.ranks).items()},
            "elements": self.elements,
            "differs": self.differs,
            "over_budget": self.outside,
            "residual": self.residual,
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What MERGED is, and the adapter that was written of it, if one was: what the renderers take."""

    inference: Inference
    extracted: Extracted | None = None


def extract(
    base: Any,
    merged: Any,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> tuple[Inference, Extracted]:
    """Infer, and write the matrices of low rank as an adapter of BASE.

    out      a folder that is not there yet
    rank     of every matrix that changed, whatever its own is; None: of those of low rank, each its own
    raises   LoraCheckError: as `infer`; UsageError: no matrix is of low rank, or OUT cannot be written
    """
    began, place = time.monotonic(), workplace.destination(out)
    with opened(base, merged) as (ours, theirs), one_thread():
        found = seen(ours, theirs, lambda one: (one.change, _module(one, rank, ours)), jobs=jobs, progress=progress)
        told = inference(ours, theirs, [change for change, _ in found], began)
        modules = [module for _, module in found if module is not None]
        if not modules:
            raise UsageError(
                f"OUT {place} was not written: no matrix of MERGED {theirs.location} has a change of low rank",
                hint="--rank R cuts a change of any rank to R; without --extract, infer tells what the change is",
            )
        _write(place, modules, ours)
    known = {one.change.tensor for one in modules}
    missing = (one.tensor for one in told.changes if one.kind is not Kind.COPY and one.tensor not in known)
    energy = sum(one.energy for one in modules)
    return told, Extracted(
        location=str(place),
        ranks=tuple(one.rank for one in modules),
        differs=sum(one.differs for one in modules),
        outside=sum(one.outside for one in modules),
        elements=sum(one.elements for one in modules),
        residual=(sum(one.residual for one in modules) / energy) ** 0.5 if energy else 0.0,
        left_out=(*missing, *told.missing, *told.extra),
    )


def _module(one: Sight, rank: int | None, base: Checkpoint) -> Module | None:
    """The factors of one matrix; None where it is not to be in the adapter, or cannot be."""
    change, delta = one.change, one.delta
    if delta is None or not _has_factors(change):
        return None
    if rank is None and one.factors is None:
        return None
    factors = one.factors if rank is None or one.factors is None else _cut(one.factors, rank)
    if rank is not None and (factors is None or len(factors.values) < rank):
        factors = _of_rank(delta, min(rank, *delta.shape))
    assert factors is not None
    plain = replace(delta, weights=None)
    return _measured(change, plain, refined(plain, factors), base)


def _has_factors(change: Change) -> bool:
    """Whether PEFT keeps this as the two factors of a linear layer."""
    linear = change.tensor.endswith(WEIGHT) and len(change.shape) == 2
    return linear and not any(word in change.family.lower() for word in EMBEDDINGS) and change.kind is not Kind.UNCLEAR


def _cut(factors: Factors, rank: int) -> Factors:
    return Factors(left=factors.left[:, :rank], values=factors.values[:rank], right=factors.right[:, :rank])


def _of_rank(delta: Delta, rank: int) -> Factors:
    return unweighed(sketch(delta, rank + SPARE), rank, delta)


def _measured(change: Change, delta: Delta, factors: Factors, base: Checkpoint) -> Module:
    """B = U sqrt(S), A = sqrt(S) V^T in float32, and what W + B A, stored, is beside M.

    An element is over budget beyond 1/2 ulp(M) + gamma(r + 5, u) (|W| + |B| |A|): one rounding, and float32 sums.
    """
    root = factors.values.sqrt()
    b, a = (factors.left * root).float(), (factors.right * root).T.float()
    counts = [_beside(delta, rows, b[rows].double(), a.double()) for rows in delta.spans()]
    differs, outside, residual, energy = torch.stack(counts).sum(0).tolist()
    turned = base.config.get("model_type") in IN_OUT_MODELS
    a, b = (b.T, a.T) if turned else (a, b)
    return Module(
        change=change,
        a=a.contiguous(),
        b=b.contiguous(),
        differs=int(differs),
        outside=int(outside),
        elements=delta.shape[0] * delta.shape[1],
        residual=residual,
        energy=energy,
    )


def _beside(delta: Delta, rows: slice, b: Tensor, a: Tensor) -> Tensor:
    """Of those rows: elements that differ, elements over budget, |W + B A, stored, - M|^2, |M - W|^2; float64."""
    storage = str(delta.merged[:0].dtype).removeprefix("torch.")
    merged, base = delta.both(rows, torch.float64)
    exact = base + b @ a
    written = store(exact.float().double(), storage)
    budget = half_cell(merged, storage) + between_orders(len(a)) / 2 * (base.abs() + b.abs() @ a.abs())
    residual = written - merged
    counts = (residual != 0).sum(), ((exact - merged).abs() > budget).sum()
    return torch.stack([*counts, residual.square().sum(), (merged - base).square().sum()]).double()


# ------------------------------------------------------------------------------------------------------------ write


def _write(place: Any, modules: Sequence[Module], base: Checkpoint) -> None:
    """Configuration and tensors into a hidden folder, which then gets its name."""
    from safetensors.torch import save

    tensors = {
        f"{PREFIX}{_name(one)}.lora_{letter}{WEIGHT}": factor for one in modules for letter, factor in _pair(one)
    }
    data = save(tensors, metadata={"format": "pt"})
    with workplace.workplace(place, uuid.uuid4().hex) as room:
        workplace.demand_space(place, len(data))
        room.write(CONFIG, (json.dumps(config(modules, base), indent=2) + "\n").encode())
        room.write(TENSORS, data)
        room.publish()


def _pair(one: Module) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("A", one.a), ("B", one.b)


def _name(one: Module) -> str:
    return one.change.module


def config(modules: Sequence[Module], base: Checkpoint) -> dict[str, Any]:
    """adapter_config.json: the commonest rank for all, the others by name; s = 1 everywhere."""
    common = Counter(one.rank for one in modules).most_common(1)[0][0]
    others = {_name(one): one.rank for one in modules if one.rank != common}
    architectures = [str(one) for one in base.config.get("architectures") or ()]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if any(one.endswith("ForCausalLM") for one in architectures) else None,
        "base_model_name_or_path": base.location,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": [_name(one) for one in modules],
        "fan_in_fan_out": base.config.get("model_type") in IN_OUT_MODELS,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
