"""LC129 other-combination

What it is
The adapters were combined by another combination_type than --combination says.

How it happens
add_weighted_adapter was called without combination_type, whose default is "svd", or with one from a guide.
The adapters were merged one after the other, which is what "cat" gives.

How it is told
The merge of the same adapters by "cat", "linear" or "ties" reproduces every element. "svd" costs too much to be
tried; where it keeps every rank, it gives what "cat" does but for its last places.

Evidence
combination: the one that fits.

What to do
Combine the adapters with the combination_type that was meant, or check with the --combination that was used.

Seen in
huggingface/peft#1155, huggingface/peft#2796, huggingface/peft#817, huggingface/peft#3152
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_check.faults._said import Told, ways
from lora_check.faults._several import combined, members, resettled
from lora_check.types import Case, Combination, Numbers, Options, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """Each other combination that is cheap to replay, with the same weights and options."""
    step = combined(case)
    if step is None or step.site is None or members(case).count < 2:
        return ()
    used: Combination = step.site.settings["combination"]
    alike = len({tuple(factor.shape) for role, factor in step.factors.items() if "A" in role}) == 1
    others = [one for one in OTHERS if one.name != used.name and (alike or one.of == "ranks")]
    return tuple(replace(resettled(case, step, combination=one), told={"combination": one.name}) for one in others)


def _added(tensors: Sequence[Numbers], weights: Sequence[float], options: Options) -> Numbers:
    """sum of w_i T_i."""
    parts = [tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]
    return sum(parts[1:], start=parts[0])


def _elected(tensors: Sequence[Numbers], weights: Sequence[float], options: Options) -> Numbers:
    """The mean of what agrees with the elected signs, the tensors pruned first."""
    from lora_check.selections import agreeing_mean, largest

    return agreeing_mean([largest(one, options.density) for one in tensors], weights, options.majority_sign_method)


OTHERS = (
    Combination(name="cat", of="ranks"),
    Combination(name="linear", mix=_added),
    Combination(name="ties", mix=_elected),
)


def tell(told: Told) -> str:
    """'adapters combined by cat'."""
    return f"{FAULT.summary}: {ways(told, 'combination')}"


FAULT = ValueFault(
    code="LC129",
    name="other-combination",
    severity="error",
    summary="adapters combined by another combination_type",
    help="combine the adapters as was meant, or check with the --combination that was used",
    inject=inject,
    tell=tell,
    causes=("M30",),
)
