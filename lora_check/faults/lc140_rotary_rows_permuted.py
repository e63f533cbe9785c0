"""LC140 rotary-rows-permuted

What it is
The rows of the delta of q and k are ordered for the other way of rotating positions.

How it happens
transformers rotates the two halves of a head, Meta's code and GGUF files rotate neighbours, so that converters reorder
the rows of q and k. An adapter that was trained in one layout was merged into a base in the other, or a converter
reordered rows of lora_B that were in the right order already. Some convert k with the number of query heads.

How it is told
W' = W + s Q B A reproduces every element of q and k, with Q the permutation of the rows of each head, in one direction
or the other. v, o and the MLP are right.

Evidence
layout: the order that the rows were put into.

What to do
Bring BASE and ADAPTER into one layout, by the converter of both or of none, and merge again.

Seen in
meta-pytorch/torchtune#933, ggml-org/llama.cpp#5947
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._rows import (
    KEYS,
    QUERIES,
    family_of,
    heads_of,
    is_pair,
    layouts,
    refactored,
    said,
)
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("interleaved", "half-split")


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s Q B A, Q from halves to neighbours or back, in each head or in its rotated rows alone."""
    if not any(is_pair(step) for step in case.steps):
        return ()
    found: list[Case] = []
    for cut in dict.fromkeys(_cuts(case)):
        for layout in LAYOUTS:
            if layout == LAYOUTS[0] or cut[-1] != 4:  # with two pairs a head there and back are the same
                found += refactored(case, partial(_turned, case=case, cut=cut, layout=layout), layout=layout)
    return tuple(found)


Cut = tuple[int, int, int]


def _cuts(case: Case) -> list[Cut]:
    """(rows of a query head, rows of a key head, rotated rows): the last for an even number of them."""
    cuts = []
    for heads in heads_of(case.config):
        keys = heads.size * heads.pairs
        wrong = keys // heads.queries if keys % heads.queries == 0 else heads.size
        cuts += [(heads.size, heads.size, heads.size), (heads.size, heads.size, heads.rotary)]
        cuts += [(heads.size, wrong, heads.size)]
    return [cut for cut in cuts if cut[2] % 2 == 0 and cut[2] > 2 and cut[1] % 2 == 0]


def _turned(step: LoadedStep, case: Case, cut: Cut, layout: str) -> Mapping[str, Tensor]:
    """The factors of a step with the rows of q and k turned; nothing of a step that has none."""
    if not is_pair(step):
        return {}
    name, b = family_of(step, case), step.factors["B"]
    if name in QUERIES or name in KEYS:
        size = cut[0] if name in QUERIES else cut[1]
        return {"B": _heads_turned(b, size, min(cut[2], size), layout)} if b.shape[0] % size == 0 else {}
    fused = next(iter(layouts(case)), {}) if step.window is None else {}
    parts = fused.get("head by head" if name == "query_key_value" else "q|k|v", {})
    if "q" not in parts:
        return {}
    turned = b.clone()
    for part, size in (("q", cut[0]), ("k", cut[1])):
        turned[parts[part]] = _heads_turned(b[parts[part]], size, min(cut[2], size), layout)
    return {"B": turned}


def _heads_turned(b: Tensor, size: int, rotary: int, layout: str) -> Tensor:
    """(heads size, r) with the first `rotary` rows of each head in the other order."""
    outer, inner = (2, rotary // 2) if layout == "interleaved" else (rotary // 2, 2)
    by_head = b.reshape(-1, size, b.shape[1]).clone()
    turned = by_head[:, :rotary].reshape(-1, outer, inner, b.shape[1]).transpose(1, 2)
    by_head[:, :rotary] = turned.reshape(-1, rotary, b.shape[1])
    return by_head.reshape(b.shape)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which way the rows were put."""
    return f"rows of the delta permuted within each attention head, into the {said(told, 'layout')} rotary layout"


FAULT = ValueFault(
    code="LC140",
    name="rotary-rows-permuted",
    severity="error",
    summary="rows of the delta permuted within each attention head, into another rotary layout",
    help="bring BASE and ADAPTER into one rotary layout, by the converter of both or of none, and merge again",
    inject=inject,
    tell=tell,
    causes=("M56",),
)
