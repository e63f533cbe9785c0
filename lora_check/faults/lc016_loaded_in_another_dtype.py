"""LC016 loaded-in-another-dtype

What it is
MERGED's config.json names a dtype that holds less than the dtype its tensors are stored in. A loader that follows the
configuration rounds every tensor once more: what was checked is not what runs.

How it happens
The model was merged in float32 or bfloat16 and saved with a configuration that says float16, or the other way round.
transformers with dtype="auto", its default from release 5 on, and vLLM follow the configuration; float16 overflows
at 65504, bfloat16 keeps 8 bits.

How it is told
dtype, or torch_dtype, of config.json against the dtype that most bytes of MERGED are stored in. Where BASE is the same
way, this is no mistake of the merge.

Evidence
config, stored: the two dtypes.

What to do
Set dtype in MERGED's config.json to the dtype of its tensors.

Seen in
hiyouga/LlamaFactory#2075, hiyouga/LlamaFactory#3137, modelscope/ms-swift#841
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lora_check.faults._configs import said
from lora_check.faults._findings import found
from lora_check.types import FLOATS, Finding, Plan, PlanFault, TensorMeta, Verdict

HOLDS = {"float64": ("float64", "float32", "bfloat16", "float16"), "float32": ("float32", "bfloat16", "float16")}
"""A dtype -> those of which it holds every number; any other holds itself alone."""


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding where loading by the configuration loses something, unless BASE is so too."""
    pair = _lossy(plan.merged_config, plan.merged_metas)
    if pair is None or pair == _lossy(plan.base_config, plan.base_metas):
        return ()
    config, stored = pair
    message = f"MERGED is stored as {stored}, and its config.json has it loaded as {config}"
    return (found(FAULT, message, config=config, stored=stored),)


def _lossy(config: Mapping[str, Any], metas: Mapping[str, TensorMeta]) -> tuple[str, str] | None:
    """The dtype of the configuration and that of most bytes, if the first does not hold the second."""
    named = str(said(config, "dtype", "torch_dtype") or "").removeprefix("torch.")
    sizes: Counter[str] = Counter()
    for meta in metas.values():
        sizes[meta.stored_as] += meta.nbytes
    stored = max(sizes, key=lambda dtype: sizes[dtype], default="")
    if named not in FLOATS or stored not in FLOATS or stored in HOLDS.get(named, (named,)):
        return None
    return named, stored


FAULT = PlanFault(
    code="LC016",
    name="loaded-in-another-dtype",
    severity="warning",
    summary="a configuration that has the tensors loaded in a dtype that holds less",
    help="set dtype in MERGED's config.json to the dtype of its tensors",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M45", "M35"),
)
