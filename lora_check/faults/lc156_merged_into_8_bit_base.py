"""LC156 merged-into-8-bit-base

What it is
The delta was added to the LLM.int8() version of BASE, decoded, and not to BASE itself.

How it happens
The model was loaded with load_in_8bit to fit into memory, decoded and merged, by a script or by an exporter that starts
from the model as it was trained (PEFT with bitsandbytes, then dequantize()).

How it is told
BASE, rounded to fp16, each row quantised to 255 steps of its largest modulus by 127 and decoded again, plus the delta
reproduces every element. Linear layers that no adapter touches show it too.

Evidence
scheme: int8. error: |decoded - BASE| / |BASE|. error_over_delta: the same against the delta; both of the first rows.

What to do
Decide which of the two the adapter is to be used with: merge into BASE, or give the decoded 8-bit base as BASE.

Seen in
artidoro/qlora#254, huggingface/peft#2321
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_check.faults._quantised_base import error_over_delta, through
from lora_check.types import Case, ValueFault

SUMMARY = "merged into the 8-bit version of BASE, decoded"


def inject(case: Case) -> tuple[Case, ...]:
    """W' = decode(quantise(W)) + s B A, in the dtype of MERGED or BASE, or in a model held in float32 or fp16."""
    return through(case, "int8", ("float32", "float16"))


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """How far that version is from BASE."""
    return f"{SUMMARY}, {error_over_delta(told)}".rstrip(", ")


FAULT = ValueFault(
    code="LC156",
    name="merged-into-8-bit-base",
    severity="error",
    summary=SUMMARY,
    help="merge into BASE itself, or give the decoded 8-bit base as BASE",
    inject=inject,
    tell=tell,
    kinds=("target", "bystander"),
    causes=("M09",),
)
