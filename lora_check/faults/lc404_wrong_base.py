"""LC404 wrong-base

What it is
MERGED was not made from this BASE: most tensors that no adapter touches differ.

How it happens
BASE is another revision, size or stage: the instruct model for the plain one, the model before an earlier
fine-tune.
The exporter fetched the base from the hub by its name, in place of the local copy it was trained on.

How it is told
Bystanders are the witness: more than half of them are not the base bit for bit, and no rounding explains it. Targets
that nothing explained (LC199) are told here. Along the delta they moved by <merged - base, delta> / <delta, delta>,
pooled: nearer to 1 than to 0, and known well enough to say so, they hold its update; nearer to 0, they do not. Where
more of them are told as LC165, BASE is the right one and was trained as a whole: then LC401 tells of the bystanders.

Evidence
changed, bystanders: how many differ, of how many. targets: how many targets nothing explained. moved: how far they
moved along the delta. most: the bystanders that differ in the largest share of their elements. recorded, merged: a
local path that the adapter records, and the hub name that MERGED has instead.

What to do
Run the check again with the base that the merge really used; --candidate-base tries several.

Seen in
hiyouga/LlamaFactory#6105, ymcui/Chinese-LLaMA-Alpaca#816, unslothai/unsloth#2150, unslothai/unsloth#3497
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lora_check.faults._findings import found, many
from lora_check.faults._names import claims, is_local_path, last
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict

CUT = "LC165"
SHOWN = 3
"""Bystanders that are named as differing most."""


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding if most bystanders changed."""
    bystanders = [one for one in comparisons if one.kind == "bystander"]
    changed = [one for one in bystanders if one.verdict is Verdict.REFUTED and one.code is None]
    if 2 * len(changed) <= len(bystanders):
        return ()
    targets = [one for one in comparisons if one.kind == "target" and one.code == "LC199"]
    cut = [one for one in comparisons if one.kind == "target" and one.code == CUT]
    if len(cut) > len(targets):
        return ()
    most = sorted(changed, key=lambda one: -one.over_budget / max(1, math.prod(one.shape)))[:SHOWN]
    moved, names = _moved(targets), _names(plan)
    parts = [
        f"made from another base: {len(changed)} of {many(len(bystanders), 'bystander')} differ from BASE",
        *_applied(targets, moved),
        *([f"the adapter records {names['recorded']}, MERGED calls itself {names['merged']}"] if names else []),
    ]
    return (
        found(
            FAULT,
            "; ".join(parts),
            (one.tensor for one in (*changed, *targets)),
            changed=len(changed),
            bystanders=len(bystanders),
            targets=len(targets),
            most=[one.tensor for one in most],
            **({"moved": moved} if moved is not None else {}),
            **names,
        ),
    )


def _moved(targets: Sequence[Comparison]) -> float | None:
    """How far the targets moved along their deltas, pooled."""
    signal = math.fsum(one.signal for one in targets)
    return math.fsum(one.overlap for one in targets) / signal if signal > 0 else None


def _applied(targets: Sequence[Comparison], moved: float | None) -> Iterator[str]:
    """Whether the targets hold the adapter, where what else they hold leaves no doubt.

    What else they hold is spread over all n elements; along the delta it comes to |residual| / (|delta| sqrt(n)).
    """
    from lora_check.rounding import MOST, SURE

    signal, noise = math.fsum(one.signal for one in targets), math.fsum(one.noise for one in targets)
    elements = sum(math.prod(one.shape) for one in targets)
    if moved is None or not SURE * math.sqrt(noise / signal / elements) < MOST:
        return
    if abs(moved - 1) < MOST:
        yield "the targets hold this adapter"
    elif abs(moved) < MOST:
        yield "the targets do not hold this adapter either"


def _names(plan: Plan) -> dict[str, Any]:
    """The local path of an adapter's record and the hub name of MERGED, where they are not of one model."""
    named = claims(plan.merged_config)
    records = [one.config.base_name for one in plan.adapters if is_local_path(one.config.base_name)]
    if not named or not records or last(records[0]) == last(named[0]):
        return {}
    return {"recorded": records[0], "merged": named[0]}


FAULT = PatternFault(
    code="LC404",
    name="wrong-base",
    severity="error",
    summary="made from another base",
    help="run the check again with the base that the merge really used, or try several with --candidate-base",
    detect=detect,
    absorbs=("LC401", "LC199"),
    verdict=Verdict.REFUTED,
    causes=("M04", "M26"),
)
