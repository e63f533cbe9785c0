"""LC161 scales-dropped

What it is
MERGED keeps codes of eight bits as BASE does, and the scales that make numbers of them are gone.

How it happens
An exporter copies float8 or int8 tensors as if they were weights and leaves out every tensor that it has no name for;
quantization_config is stripped with them. A loader then takes the codes for the numbers.

How it is told
By headers alone: a tensor of BASE in codes with scales, in MERGED a tensor of the same name in the dtype of these codes
with nothing beside it. What its numbers should be cannot be said, so such a tensor is neither verified nor refuted.

Evidence
count: how many there are. dtypes: what they are stored in.

What to do
Decode the base, merge into that, and save the numbers; or quantise again and save codes and scales together.

Seen in
unslothai/unsloth-zoo#803, unslothai/unsloth#4919, modelscope/ms-swift#7907, hiyouga/LlamaFactory#10328
"""

from __future__ import annotations

from lora_check.faults._findings import found, listed, many
from lora_check.types import Finding, Pairing, Plan, PlanFault, Verdict

CODES = ("float8_e4m3fn", "float8_e5m2", "int8")


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every such tensor."""
    bare = {one.merged.name: one.merged.dtype for one in plan.pairings if _is_bare(one)}
    if not bare:
        return ()
    dtypes = list(dict.fromkeys(bare.values()))
    message = f"{many(len(bare), 'tensor')} of MERGED in {listed(dtypes)} without the scales that BASE has beside them"
    return (found(FAULT, message, bare, count=len(bare), dtypes=dtypes),)


def _is_bare(pairing: Pairing) -> bool:
    """Codes with scales in BASE, a bare tensor of the same dtype in MERGED."""
    kept = pairing.base is not None and pairing.base.codes.endswith(CODES)
    return kept and not pairing.merged.codes and pairing.merged.dtype in CODES


FAULT = PlanFault(
    code="LC161",
    name="scales-dropped",
    severity="warning",
    summary="codes without their scales",
    help="decode the base, merge into that and save the numbers, or save codes and scales together",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M17",),
)
