"""Rows of factors: what the faults share that put the right delta in the wrong place.

A row of B, and a column of A, is one output or one input of the target: to move it moves that row or column of the
delta, whatever way the weight is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_check.faults._cases import deltas
from lora_check.faults._findings import listed
from lora_check.types import Case, LoadedStep

if TYPE_CHECKING:
    from torch import Tensor

QUERIES = ("q_proj", "query", "wq", "Wq", "q", "to_q", "attn_q", "q_lin", "query_proj")
KEYS = ("k_proj", "key", "wk", "Wk", "k", "to_k", "attn_k", "k_lin", "key_proj")
FUSED_ATTENTION = (
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "W_pack",
    "in_proj",
    "in_proj_weight",
    "Wqkv",
    "wqkv",
    "qkv",
    "to_qkv",
    "attn_qkv",
)
FUSED_GATES = ("gate_up_proj", "gate_up", "w1w3", "w13", "dense_h_to_4h_swiglu")

_LEAF = re.compile(r"\.(?:weight|bias)$")
_QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_PAIR_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_SIZES = ("head_dim", "kv_channels")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_ROTARY = ("partial_rotary_factor", "rotary_pct", "rope_partial_factor")


def family(name: str) -> str:
    """'q_proj' of model.layers.0.self_attn.q_proj.weight, and of the module itself."""
    return _LEAF.sub("", name).rpartition(".")[-1]


def family_of(step: LoadedStep, case: Case) -> str:
    """The name of the module whose factors these are: of rows of a fused tensor, that of the part."""
    return family(step.site.parameter if step.site else case.module)


def tensor_family(case: Case) -> str:
    """The own name of the merged tensor, whatever part of it a step changes."""
    return family(case.name or case.module)


# ------------------------------------------------------------------------------------------------------- factors


def is_pair(step: LoadedStep) -> bool:
    """Whether the delta is s B A of two matrices, A (r, in) and B (out, r), by LoRA's own formula."""
    a, b = step.factors.get("A"), step.factors.get("B")
    plain = step.recipe.method is None and step.factors.keys() <= {"A", "B", "m"} and not step.recipe.stacked
    return plain and a is not None and b is not None and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]


def pairs(case: Case) -> bool:
    """Whether all that is done to a tensor is to add such deltas, or to add them under a magnitude."""
    return bool(case.steps) and all(is_pair(step) for step in case.steps)


def refactored(case: Case, change: Callable[[LoadedStep], Mapping[str, Tensor]], **told: Any) -> tuple[Case, ...]:
    """The case with some factors changed; none, if no number of theirs moves, or if nothing is left of one (LC101).

    change   step -> its changed factors, by role, of the shapes that they had
    """
    changes = [{} if step.recipe.copies else change(step) for step in case.steps]
    unchanged = all(_same(new, step.factors) for new, step in zip(changes, case.steps, strict=True))
    if unchanged or any(not bool(tensor.any()) for new in changes for tensor in new.values()):
        return ()
    steps = tuple(replace(step, factors={**step.factors, **new}) for new, step in zip(changes, case.steps, strict=True))
    return (replace(case, steps=steps, told=told),)


def _same(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> bool:
    return all(tensor.equal(old[role]) for role, tensor in new.items())


def different(orders: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each order once, and none that moves nothing."""
    seen: list[Tensor] = []
    for name, order in orders.items():
        still = bool((order[1:] > order[:-1]).all())
        if not still and not any(order.equal(one) for one in seen):
            seen.append(order)
            yield name, order


# --------------------------------------------------------------------------------------------------------- heads


class Heads(NamedTuple):
    """How a configuration cuts the rows of attention.

    queries, pairs   heads of queries, and of keys and values    size, rotary   rows of a head, and those that turn
    """

    queries: int
    pairs: int
    size: int
    rotary: int


def heads_of(config: Mapping[str, Any]) -> tuple[Heads, ...]:
    """What the configuration, and each one inside it, says of attention heads."""
    inner = [one for one in config.values() if isinstance(one, Mapping)]
    return tuple(dict.fromkeys(heads for one in (config, *inner) for heads in _heads(one)))


def _heads(config: Mapping[str, Any]) -> Iterator[Heads]:
    queries, hidden = _first(config, _QUERY_HEADS), _first(config, _HIDDEN)
    size = _first(config, _SIZES) or (hidden // queries if queries and hidden else 0)
    if not queries or not size:
        return
    said = next((config[key] for key in _ROTARY if isinstance(config.get(key), float) and 0 < config[key] < 1), 1.0)
    rotary = config.get("rotary_dim") if isinstance(config.get("rotary_dim"), int) else int(size * said)
    for pair_heads in dict.fromkeys((_first(config, _PAIR_HEADS), queries, 1)):
        if pair_heads and queries % pair_heads == 0:
            yield Heads(queries, pair_heads, size, min(int(rotary or size), size))


def _first(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    found = (config.get(key) for key in keys)
    return next((one for one in found if isinstance(one, int) and not isinstance(one, bool) and one > 0), 0)


# --------------------------------------------------------------------------------------------- fused projections


def whole(case: Case) -> tuple[LoadedStep, ...]:
    """One step over all rows for each adapter: factors of parts side by side, with zeros where a part has no say.

    Nothing, where the steps are not all plain deltas, or some have all rows and others only theirs.
    """
    steps = deltas(case)
    if not pairs(case) or any(step.recipe.apply for step in steps):
        return ()
    if all(step.window is None for step in steps):
        return steps
    if any(step.window is None for step in steps):
        return ()
    by_adapter: dict[int, list[LoadedStep]] = {}
    for step in steps:
        by_adapter.setdefault(step.adapter, []).append(step)
    return tuple(_joined(parts, case.rows) for parts in by_adapter.values())


def _joined(parts: Sequence[LoadedStep], rows: int) -> LoadedStep:
    """Deltas of some rows each as one: A below one another, B on a diagonal of blocks."""
    import torch

    first, rank = parts[0], 0
    b = first.factors["B"].new_zeros(rows, sum(int(part.factors["A"].shape[0]) for part in parts))
    for part in parts:
        assert part.window is not None
        own = part.factors["B"] if part.s == first.s else part.factors["B"] * (part.s / first.s)
        b[slice(*part.window), rank : rank + own.shape[1]] = own
        rank += int(own.shape[1])
    site = first.site and replace(first.site, shape=(rows, *first.site.shape[1:]))
    return replace(
        first, window=None, site=site, factors={"A": torch.cat([part.factors["A"] for part in parts]), "B": b}
    )


def layouts(case: Case) -> tuple[dict[str, dict[str, Tensor]], ...]:
    """The ways in which the rows of a fused tensor may belong to its parts: way -> part -> its rows, in their order.

    One mapping for each reading of the configuration; nothing, where the tensor is none, or its sizes are not told.
    """
    steps = [step for step in deltas(case) if step.factors.keys() >= {"A", "B"}]
    rows = case.rows if any(step.window for step in steps) else _outputs(steps[0], case) if steps else 0
    own, parts = tensor_family(case), {family_of(step, case) for step in steps if step.window}
    if own in FUSED_GATES or (parts & {"gate_proj", "up_proj"} and rows % 2 == 0):
        return (_gates(rows),) if rows % 2 == 0 else ()
    if own in FUSED_ATTENTION or parts & {"q_proj", "k_proj", "v_proj"}:
        return tuple(_attention(rows, heads) for heads in heads_of(case.config) if _fits(rows, heads))
    return ()


def _outputs(step: LoadedStep, case: Case) -> int:
    """Outputs of the factors: the rows of B, but where those are the model's hidden numbers and A's columns are not.

    PEFT takes some stacks of experts the other way round.
    """
    rows, columns = int(step.factors["B"].shape[0]), int(step.factors["A"].shape[1])
    inner = [one for one in case.config.values() if isinstance(one, Mapping)]
    hidden = {_first(one, _HIDDEN) for one in (case.config, *inner)}
    return columns if step.recipe.stacked and rows in hidden and columns not in hidden else rows


def _fits(rows: int, heads: Heads) -> bool:
    return (heads.queries + 2 * heads.pairs) * heads.size == rows


def _gates(rows: int) -> dict[str, dict[str, Tensor]]:
    import torch

    index = torch.arange(rows)
    half = rows // 2
    return {
        "gate|up": {"gate": index[:half], "up": index[half:]},
        "in turn": {"gate": index[0::2], "up": index[1::2]},
    }


def _attention(rows: int, heads: Heads) -> dict[str, dict[str, Tensor]]:
    """q|k|v below one another; head by head, or group by group; and number by number within a head."""
    import torch

    index, (queries, pairs_, size, _) = torch.arange(rows), heads
    ends = (queries * size, (queries + pairs_) * size)
    group = queries // pairs_
    grouped = index.reshape(pairs_, group + 2, size)
    found = {
        "q|k|v": {"q": index[: ends[0]], "k": index[ends[0] : ends[1]], "v": index[ends[1] :]},
        "head by head": {
            "q": grouped[:, :group].reshape(-1),
            "k": grouped[:, group].reshape(-1),
            "v": grouped[:, group + 1].reshape(-1),
        },
    }
    if group == 1:
        single = index.reshape(queries * size, 3)
        found["number by number"] = {name: single[:, i] for i, name in enumerate("qkv")}
    return found


# --------------------------------------------------------------------------------------------------------- words


def said(told: Sequence[Mapping[str, Any]], key: str, limit: int = 3) -> str:
    """The values of one piece of evidence, most common first, at most that many of them."""
    values = Counter(str(one[key]) for one in told if key in one)
    return listed((value for value, _ in values.most_common()), limit) if values else ""


def span(start: int, stop: int, size: int, noun: str) -> str:
    """'rows 0-287 of 576'."""
    return f"{noun} {start}-{stop - 1} of {size}"
