"""LC151 row-parallel-delta-summed

What it is
Projections whose inputs tensor parallelism divides (o_proj, down_proj) have their delta 2, 4 or 8 times, the others
once.

How it happens
Each rank computed the whole delta of a row-parallel layer, and the all-reduce that sums the ranks' partial products
added it up as often as there are ranks. Seen in trainers on Megatron that send merged weights to a rollout engine.

How it is told
Every row-parallel target that shows its delta has it the same number of times (LC102, or a factor of LC110), and no
other target has.

Evidence
times: how often the delta is there; the size of the tensor-parallel group. families: those that have it so.

What to do
Merge on one rank, or let each rank add only its own slice of the inputs, and merge again.

Seen in
radixark/miles#3232, NVIDIA-NeMo/Megatron-Bridge#2194, NVIDIA-NeMo/Megatron-Bridge#5396
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_check.faults._findings import found, listed, many
from lora_check.faults._rows import family
from lora_check.faults._scales import SCALED, factor_fits, telling
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict

ROW_PARALLEL = (
    "o_proj",
    "out_proj",
    "down_proj",
    "c_proj",
    "dense",
    "dense_4h_to_h",
    "linear_proj",
    "linear_fc2",
    "wo",
    "w2",
    "fc2",
    "fc_out",
    "attn_output",
    "ffn_down",
)
"""The projections that a tensor-parallel model divides along their inputs."""

TIMES = (2, 4, 8)


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding if exactly the row-parallel targets have their delta several times."""
    targets = telling(comparisons)
    members = [one for one in targets if family(one.tensor) in ROW_PARALLEL]
    others = [one for one in targets if family(one.tensor) not in ROW_PARALLEL]
    if not members or not others or any(one.code in SCALED for one in others):
        return ()
    for times in TIMES:
        if all(factor_fits(one, times) for one in members):
            families = Counter(family(one.tensor) for one in members)
            message = (
                f"delta added {times} times in {listed(sorted(families))}: {many(len(members), 'row-parallel target')}"
            )
            tensors = (one.tensor for one in members)
            return (found(FAULT, message, tensors, times=times, families=dict(families)),)
    return ()


FAULT = PatternFault(
    code="LC151",
    name="row-parallel-delta-summed",
    severity="error",
    summary="the delta of row-parallel projections summed over ranks",
    help="merge on one rank, or let each rank add its own slice of the inputs alone, and merge again",
    detect=detect,
    absorbs=SCALED,
    verdict=Verdict.REFUTED,
    causes=("M39",),
)
