"""LC120 through-narrower-dtype

What it is
The file is stored in a wide dtype, and its numbers have been through a narrower one.

How it happens
The model was loaded or merged in bf16 or fp16 (a loader's default, a .half() in the script) and saved as
fp32.
A bf16 copy was converted to fp16, which widens the mantissa and brings nothing back.

How it is told
The right tensor, rounded to bf16 or fp16 and then stored as it is, or merged in a model held in that dtype,
reproduces every element. Bystanders and saved modules show it too. A bf16 file that went through fp16 is not told:
that order counts as an honest one, and so does a bf16 model stored as fp16: what fp16 rounds to zero is verified, what
it rounds to infinity is LC130.

Evidence
over_budget: elements of the worst target that no honest merge can have written. survival: what the narrower
dtype kept of the delta.

What to do
Load the base in the dtype of the file you want, merge, and save once.

Seen in
axolotl-ai-cloud/axolotl#902, ggml-org/llama.cpp#10049, hiyouga/LlamaFactory#3137, modelscope/ms-swift#841
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.types import Case, ValueFault

NARROWER = {"float64": ("bfloat16", "float16"), "float32": ("bfloat16", "float16"), "float16": ("bfloat16",)}


def inject(case: Case) -> tuple[Case, ...]:
    """W' = narrow(W + s B A), or the same in a narrow model; what is untouched and narrow already cannot lose by it."""
    untouched = not any(step.factors for step in case.steps)
    kept = str(case.base.dtype).removeprefix("torch.") if untouched else None
    formats = [one for one in NARROWER.get(case.storage, ()) if one != kept]
    through = tuple(replace(case, through=one) for one in formats)
    return through if untouched else through + tuple(replace(case, held=one) for one in formats)


FAULT = ValueFault(
    code="LC120",
    name="through-narrower-dtype",
    severity="error",
    summary="rounded to a narrower dtype on the way",
    help="load the base in the dtype of the file you want, merge, and save once",
    inject=inject,
    kinds=("target", "copy", "bystander"),
    causes=("M45",),
)
