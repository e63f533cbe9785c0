# ruff: noqa: ANN001, ANN202 -- what a kernel is given are pointers and scalars, typed by each launch
"""Our kernels in Triton; imported where there is a GPU, or Triton's interpreter.

Letters as in the nouns: x (T, K), W (N, K), A (r, K), B (N, r), all contiguous. A program of the grid makes one tile of
BT x BN, over K in steps of BK. R is r up to a power of two from 16 on, the least that a matrix unit takes; B reads as
zero beyond r. Sums are kept in float32. Rows beyond T, N and r wrap round, so that only stores need a mask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

FEW = 16
"""Tokens that fit the smallest tile: weights are what such a forward waits for."""
PARTS = {True: 16, False: 4}
"""Pieces of K, at most, that the shrink is cut into, for a few tokens and for many. A tile of the product holds all of
them in registers when it adds them up: more than 4 of 64 rows spill (`cuobjdump -res-usage` shows a stack)."""
PROGRAMS = 128
"""Programs that keep a large GPU busy: an H200 has 132 multiprocessors."""


def quickly(call: Callable[[], None], quantiles: tuple[float, ...]) -> Any:
    """How Triton tries a configuration: in a fifth of its usual time, as each shape of the benchmark is tuned."""
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def fitting(configs: list[triton.Config], named: Mapping[str, Any], **_: Any) -> list[triton.Config]:
    """Those whose tile suits T: the smallest for a few tokens, none wider than 64 rows up to 64 of them."""
    tokens = named["T"]
    heights = {FEW} if tokens <= FEW else {64} if tokens <= 64 else {64, 128}
    return [config for config in configs if config.kwargs["BT"] in heights]


def configuration(height: int, width: int, step: int, warps: int, stages: int) -> triton.Config:
    """BT, BN, BK, and how Triton runs them."""
    return triton.Config({"BT": height, "BN": width, "BK": step}, num_warps=warps, num_stages=stages)


PRODUCTS = [
    configuration(*sizes)
    for sizes in (
        (16, 16, 256, 4, 4),
        (16, 32, 256, 4, 3),
        (16, 64, 128, 4, 4),
        (64, 32, 128, 4, 4),
        (64, 64, 32, 4, 3),
        (64, 128, 64, 4, 4),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
    )
]
ADDITIONS = [
    configuration(*sizes)
    for sizes in (
        (16, 32, 256, 4, 3),
        (16, 64, 128, 4, 3),
        (16, 128, 64, 4, 4),
        (64, 64, 32, 4, 2),
        (64, 128, 64, 4, 3),
        (64, 256, 64, 8, 3),
    )
]
TUNING: dict[str, Any] = {
    "key": ["T", "K", "N", "RANK"],
    "prune_configs_by": {"early_config_prune": fitting},
    "do_bench": quickly,
}
WHOLE = {"WHOLE": lambda given: given["K"] % given["BK"] == 0}


@triton.jit
def part_of(pointers, steps, left, WHOLE: tl.constexpr):
    """A tile, zero from `left` steps on."""
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=steps < left, other=0.0)


@triton.jit(do_not_specialize=["T"])
def shrink(
    x,
    a,
    h,
    T,
    K,
    span,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """h[part] = x A^T over the K of a part, `span` long; h (parts, T, R) in float32."""
    t, part = tl.program_id(0), tl.program_id(1)
    rows, ranks, steps = t * BT + tl.arange(0, BT), tl.arange(0, R), tl.arange(0, BK)
    first, last = part * span, tl.minimum(part * span + span, K)
    xs = x + (rows % T).to(tl.int64)[:, None] * K + first + steps[None, :]
    ws = a + (ranks % RANK).to(tl.int64)[None, :] * K + first + steps[:, None]
    total = tl.zeros((BT, R), tl.float32)
    for k in range(first, last, BK):
        left = part_of(xs, steps[None, :], last - k, False)
        right = part_of(ws, steps[:, None], last - k, False)
        total = tl.dot(left, right, total, input_precision="ieee")
        xs += BK
        ws += BK
    places = h + (part * T + rows).to(tl.int64)[:, None] * R + ranks[None, :]
    tl.store(places, total, mask=rows[:, None] < T)


@triton.autotune(PRODUCTS, **TUNING)
@triton.heuristics(WHOLE)
@triton.jit(do_not_specialize=["T"])
def product(
    x,
    w,
    bias,
    h,
    b,
    y,
    T,
    K,
    N,
    scale,
    RANK: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """y = x W^T + bias + s h B^T in one pass over y: the tile gets its adapter before it is stored.

    h (PARTS, T, R) is summed over its parts, scaled in float32 and rounded once to the dtype of B. Programs go down
    GROUP tiles of rows before they move to the next columns, so that neighbours find W and x in the L2.
    """
    program, down, across = tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(N, BN)
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = program % (GROUP * across)
    t, n = group * GROUP + within % height, within // height
    rows, columns, steps = t * BT + tl.arange(0, BT), n * BN + tl.arange(0, BN), tl.arange(0, BK)
    here, there = (rows % T).to(tl.int64), (columns % N).to(tl.int64)
    xs = x + here[:, None] * K + steps[None, :]
    ws = w + there[None, :] * K + steps[:, None]
    total = tl.zeros((BT, BN), tl.float32)
    for k in range(0, K, BK):
        left = part_of(xs, steps[None, :], K - k, WHOLE)
        right = part_of(ws, steps[:, None], K - k, WHOLE)
        total = tl.dot(left, right, total, input_precision="ieee")
        xs += BK
        ws += BK
    RB: tl.constexpr = min(R, 32)
    for first in tl.range(0, R, RB, num_stages=1):
        ranks = first + tl.arange(0, RB)
        hidden = tl.zeros((BT, RB), tl.float32)
        for part in tl.static_range(PARTS):
            hidden += tl.load(h + (part * T + here)[:, None] * R + ranks[None, :])
        right = tl.load(b + there[None, :] * RANK + ranks[:, None], mask=ranks[:, None] < RANK, other=0.0)
        total = tl.dot((hidden * scale).to(right.dtype), right, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + there)[None, :].to(tl.float32)
    inside = (rows[:, None] < T) & (columns[None, :] < N)
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.autotune(ADDITIONS, restore_value=["y"], **TUNING)
@triton.heuristics(WHOLE)
@triton.jit(do_not_specialize=["T"])
def addition(
    x,
    a,
    b,
    y,
    T,
    K,
    N,
    scale,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """y += s (x A^T) B^T: each tile makes the x A^T of its rows itself, which saves a kernel and costs reads of A."""
    rows, columns = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BN + tl.arange(0, BN)
    ranks, steps = tl.arange(0, R), tl.arange(0, BK)
    here, there = (rows % T).to(tl.int64), (columns % N).to(tl.int64)
    xs = x + here[:, None] * K + steps[None, :]
    ws = a + (ranks % RANK).to(tl.int64)[None, :] * K + steps[:, None]
    hidden = tl.zeros((BT, R), tl.float32)
    for k in range(0, K, BK):
        left = part_of(xs, steps[None, :], K - k, WHOLE)
        right = part_of(ws, steps[:, None], K - k, WHOLE)
        hidden = tl.dot(left, right, hidden, input_precision="ieee")
        xs += BK
        ws += BK
    right = tl.load(b + there[None, :] * RANK + ranks[:, None], mask=ranks[:, None] < RANK, other=0.0)
    inside = (rows[:, None] < T) & (columns[None, :] < N)
    places = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    total = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    total = tl.dot((hidden * scale).to(right.dtype), right, total, input_precision="ieee")
    tl.store(places, total.to(y.dtype.element_ty), mask=inside)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
    """x W^T + bias + s x A^T B^T in two kernels, (T, K) -> (T, N): the shrink, and the product with its adapter."""
    (tokens, inputs), outputs, rank = x.shape, len(weight), len(a)
    padded, height = padded_rank(rank), FEW if tokens <= FEW else 64
    step = (256 if padded <= 64 else 128) // x.element_size()
    parts = max(1, min(PARTS[tokens <= FEW], PROGRAMS // triton.cdiv(tokens, height), triton.cdiv(inputs, step)))
    span = triton.cdiv(triton.cdiv(inputs, step), parts) * step
    h = torch.empty(parts, tokens, padded, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    shrink[(triton.cdiv(tokens, height), parts)](
        x, a, h, tokens, inputs, span, RANK=rank, R=padded, BT=height, BK=step, num_warps=4, num_stages=3
    )
    product[lambda tile: (triton.cdiv(tokens, tile["BT"]) * triton.cdiv(outputs, tile["BN"]),)](
        *(x, weight, x if bias is None else bias, h, b, y, tokens, inputs, outputs, s),
        RANK=rank,
        R=padded,
        PARTS=parts,
        BIASED=bias is not None,
        GROUP=8,
    )
    return y


def add(x: Tensor, a: Tensor, b: Tensor, s: float, y: Tensor) -> None:
    """y += s x A^T B^T in one kernel; x (T, K), y (T, N)."""
    (tokens, inputs), outputs, rank = x.shape, len(b), len(a)
    addition[lambda tile: (triton.cdiv(tokens, tile["BT"]), triton.cdiv(outputs, tile["BN"]))](
        x, a, b, y, tokens, inputs, outputs, s, RANK=rank, R=padded_rank(rank)
    )


def padded_rank(rank: int) -> int:
    """R: the least power of two from 16 on that holds r."""
    return max(16, triton.next_power_of_2(rank))
