"""LC159 codes-taken-for-numbers

What it is
BASE keeps codes and scales, and MERGED holds the codes as if they were the weights: the scales were never applied.

How it happens
An exporter takes float8 or int8 tensors for plain weights, converts them to bf16, adds the delta or not, and drops the
quantisation from config.json (unsloth, ms-swift, LLaMA-Factory and scripts over safetensors, with fp8 releases).

How it is told
The raw codes, read as numbers, reproduce every element; with the delta added or without. MERGED / decoded BASE is then
1 / scale throughout each block. Layers that no adapter touches show it too. Scales that were left beside the numbers
are told by LC314, codes that were left without scales by LC161.

Evidence
codes: the dtype of the codes. scale: |decoded BASE| / |codes| in the first rows. delta: whether it was added.

What to do
Decode the base first (codes times scales), merge into that, and take the quantisation out of config.json.

Seen in
unslothai/unsloth-zoo#803, unslothai/unsloth#4919, modelscope/ms-swift#7907, hiyouga/LlamaFactory#10328,
p-e-w/heretic#182, kohya-ss/musubi-tuner#582
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from lora_check.faults._cases import copies, deltas
from lora_check.faults._findings import listed
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 16
"""Rows in which codes and decoded numbers are set against each other."""


def inject(case: Case) -> tuple[Case, ...]:
    """W' = Q + s B A, or W' = Q, with Q the codes and not Q times scale."""
    if case.codes is None or case.grid is not None:
        return ()
    codes = case.codes()
    kind = str(codes.dtype).removeprefix("torch.")
    if not kind.startswith(("float8_e4m3", "float8_e5m2", "int8")) or codes.numel() != case.base.numel():
        return ()
    return _over(case, codes.reshape(case.base.shape), kind)


def _over(case: Case, codes: Tensor, kind: str) -> tuple[Case, ...]:
    import torch

    from lora_check.dequantised import as_numbers

    sizes = [one[:FIRST].to(torch.float64).norm().item() for one in (case.base, codes)]
    told: dict[str, Any] = {"codes": kind, "scale": sizes[0] / sizes[1] if sizes[1] else None}
    if sizes[0] == sizes[1]:
        return ()
    base = cast("Tensor", as_numbers(codes, getattr(torch, case.storage)))
    raw = replace(case, base=base, steps=copies(case), told=told | {"delta": False})
    return (replace(case, base=base, told=told | {"delta": True}), raw) if deltas(case) else (raw,)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which codes, and whether the delta was added to them."""
    kinds = listed(dict.fromkeys(str(one["codes"]) for one in told))
    added = " and the delta added to them" if any(one["delta"] for one in told) else ""
    return f"{kinds} codes taken for numbers{added}, their scales dropped,"


FAULT = ValueFault(
    code="LC159",
    name="codes-taken-for-numbers",
    severity="error",
    summary="codes taken for numbers, their scales dropped",
    help="decode the base (codes times scales), merge into that, and take the quantisation out of config.json",
    inject=inject,
    tell=tell,
    kinds=("target", "bystander"),
    causes=("M17", "M28"),
)
