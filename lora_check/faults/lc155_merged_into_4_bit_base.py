"""LC155 merged-into-4-bit-base

What it is
The delta was added to the 4-bit version of BASE, decoded, and not to BASE itself.

How it happens
The model was loaded with load_in_4bit, as it was while the adapter was trained, then decoded and merged; or a QLoRA
trainer merged for its user (unsloth, axolotl, scripts around dequantize_4bit). That is a convention and no slip of
arithmetic: the adapter was trained beside the quantisation error, which BASE does not have. But MERGED is not what
BASE + adapter compute.

How it is told
BASE, quantised by bitsandbytes' rule (nf4 or fp4, blocks of 64, largest modulus) and decoded again, plus the delta
reproduces every element. Linear layers that no adapter touches show it too. With double quantisation, or another
quantiser, LC157 tells it.

Evidence
scheme: nf4 or fp4. error: |decoded - BASE| / |BASE|. error_over_delta: the same against the delta; both of the first
rows.

What to do
Decide which of the two the adapter is to be used with: merge into BASE, or give the decoded 4-bit base as BASE.

Seen in
unslothai/unsloth-zoo#810, unslothai/unsloth#195, artidoro/qlora#28, artidoro/qlora#254, huggingface/peft#2105,
huggingface/peft#2321, huggingface/trl#1193, axolotl-ai-cloud/axolotl#596, axolotl-ai-cloud/axolotl#460
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_check.faults._findings import listed
from lora_check.faults._quantised_base import error_over_delta, through
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = decode(quantise(W)) + s B A, in the dtype of MERGED or BASE, or in a model held in float32 or fp16."""
    common = through(case, "nf4", ("float32", "float16"))
    return common + through(case, "fp4", ())


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which version, and how far it is from BASE."""
    schemes = listed(dict.fromkeys(str(one["scheme"]).upper() for one in told))
    return f"merged into the {schemes} version of BASE, decoded, {error_over_delta(told)}".rstrip(", ")


FAULT = ValueFault(
    code="LC155",
    name="merged-into-4-bit-base",
    severity="error",
    summary="merged into the 4-bit version of BASE, decoded",
    help="merge into BASE itself, or give the decoded 4-bit base as BASE",
    inject=inject,
    tell=tell,
    kinds=("target", "bystander"),
    causes=("M09",),
)
