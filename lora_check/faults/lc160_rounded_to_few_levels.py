"""LC160 rounded-to-few-levels

What it is
MERGED was quantised after the merge and decoded again: its float numbers are those of a 4-bit model.

How it happens
The base was loaded in 4-bit codes, PEFT merged into them and quantised again, and the model was decoded for saving. A
fused model was quantised with the bits of its base (mlx-lm fuse, mflux, llama.cpp) and decoded later. The step of the
codes is often larger than the delta: then most codes are those of BASE, and the fine-tune is gone.

How it is told
MERGED itself has no more than 16 different values in each block of 32, 64 or 128 elements of a row, and BASE has more.

Evidence
block: elements in a block. step_over_delta: the mean step of the codes, sqrt(12) |MERGED - BASE - s B A|, against the
mean size of s B A. survival: the share of the delta that is left; where the step is far larger, near 1 only on average.

What to do
Check the merge before it was quantised; then quantise with more bits, or serve the adapter beside the quantised base.

Seen in
ml-explore/mlx-lm#1564, ml-explore/mlx-lm#1172, mflux-community/mflux#668, mflux-community/mflux#665,
axolotl-ai-cloud/axolotl#3803, axolotl-ai-cloud/axolotl#3753, johnsmith0031/alpaca_lora_4bit#109,
ggml-org/llama.cpp#3333, ml-explore/mlx-examples#488, huggingface/peft#851
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_check.faults._cases import never
from lora_check.faults._findings import listed
from lora_check.faults._levels import BLOCKS, LEVELS, on_levels
from lora_check.faults._residuals import additive, delta_of, parts
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor


def recognise(case: Case, actual: Tensor) -> dict[str, Any] | None:
    """The first size of blocks in which MERGED has few different values."""
    columns = int(case.base.shape[1])
    plain = case.grid is None and actual.is_floating_point() and case.base.is_floating_point()
    sizes = [size for size in BLOCKS if columns % size == 0]
    return next((found for size in sizes if (found := _in_blocks(case, actual, size))), None) if plain else None


def _in_blocks(case: Case, actual: Tensor, size: int) -> dict[str, Any] | None:
    import torch

    from lora_check.rounding import UNLIKE

    blocks = telling = 0
    error = delta = 0.0
    for rows in parts(case):
        seen, base = actual[rows].to(torch.float64), case.base[rows].to(torch.float64)
        count, informative, few = on_levels(seen, torch.zeros_like(seen), base, size)
        if few < informative or not (blocks or informative):
            return None
        blocks, telling = blocks + count, telling + informative
        if additive(case):
            added = delta_of(case, rows)[0] + torch.zeros_like(seen)
            error, delta = error + _square(seen - added - base), delta + _square(added)
    if telling < UNLIKE * blocks:
        return None
    return {"block": size} | ({"step_over_delta": (12 * error / delta) ** 0.5} if delta else {})


def _square(x: Tensor) -> float:
    return float(x.square().sum().item())


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """The size of the blocks, and the largest step against the delta."""
    sizes = listed(dict.fromkeys(str(one["block"]) for one in told))
    steps = [one["step_over_delta"] for one in told if one.get("step_over_delta") is not None]
    ratio = f", with steps of up to {max(steps):.2g} times the delta" if steps else ""
    return f"quantised after the merge and decoded: {LEVELS} levels or fewer in each block of {sizes}{ratio},"


FAULT = ValueFault(
    code="LC160",
    name="rounded-to-few-levels",
    severity="error",
    summary="quantised after the merge and decoded",
    help="check the merge before it was quantised, then quantise with more bits or serve the adapter unmerged",
    inject=never,
    recognise=recognise,
    tell=tell,
    kinds=("target", "bystander"),
    causes=("M07",),
)
