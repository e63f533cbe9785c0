"""LC209 cannot-pair

What it is
MERGED lacks tensors of BASE and has others of the same shapes, or of the same size in all: they may be the same tensors
under names, or in pieces, that no known layout explains.

How it happens
The merged model was saved by a tool that renames, fuses or splits tensors in a way of its own.
The architecture is renamed by a release of transformers that is not installed here.
A tensor was lost and another one added that only looks like it.

How it is told
By names and shapes alone. Nothing is compared by such a guess: a tensor that cannot be paired is never called wrong,
and never right.

Evidence
closest: for a few of the missing names, the name of MERGED that it may have become. unpaired: how many there are.

What to do
Install the release of transformers that loads both checkpoints, or save MERGED with the names of BASE.

Seen in
huggingface/transformers#38627, vllm-project/vllm#34186
"""

from __future__ import annotations

from lora_check.faults._findings import found, listed, many
from lora_check.faults._unpaired import unpaired
from lora_check.types import Finding, Plan, PlanFault, Verdict

EXAMPLES = 3


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every name that may have become another one."""
    pairs = unpaired(plan)
    if not pairs:
        return ()
    closest = dict(list(pairs.items())[:EXAMPLES])
    shown = listed([f"{ours} with {theirs}" for ours, theirs in closest.items()], limit=1)
    message = f"cannot pair {many(len(pairs), 'tensor')} of BASE with those of MERGED: perhaps {shown}"
    names = [*pairs, *pairs.values()]
    return (found(FAULT, message, names, unpaired=len(pairs), closest=closest),)


FAULT = PlanFault(
    code="LC209",
    name="cannot-pair",
    severity="warning",
    summary="tensors that may be the same under other names",
    help="install the transformers that loads both checkpoints, or save MERGED with the names of BASE",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
)
