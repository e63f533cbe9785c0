"""LC509 keys-not-matched

What it is
Targets hold the base, and the adapter's keys name just these otherwise than a loader looks for them.

How it happens
Another model class was trained than is merged into: vision-language models before and after transformers 4.52 and 5,
a language model taken out of one, Qwen's thinker (vLLM, ColPali, LLaMA-Factory).
A wrapper's prefix stayed in the keys: _orig_mod. of torch.compile, module. of DDP (Automodel, ms-swift).
PEFT loads with no more than a warning about missing keys; B keeps the zeros it begins with, and zero is merged.

How it is told
What is told as not applied (LC101) is just what has such keys, or names nothing in BASE until one rewriting of all
keys, which is told, is made. Files cannot show whether the loader or somebody else left the adapter out. Load the
adapter, and look whether a lora_B is zero in memory: in the file it is not.

Evidence
as_written, looked_for: a key, and what PEFT looks for. B: it is not zero in the file, so training is not to blame.

What to do
Rename the keys, or load the adapter into the class that it was trained on, and merge again.

Seen in
vllm-project/vllm#34186, vllm-project/vllm#39278, huggingface/transformers#38627, huggingface/transformers#38927,
illuin-tech/colpali#424, huggingface/peft#2699, modelscope/ms-swift#6481, hiyouga/LlamaFactory#10294,
NVIDIA-NeMo/Automodel#3630
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_check.faults._findings import found
from lora_check.faults._keys import (
    PREFIX,
    is_base_prefix,
    is_foreign,
    module_of,
    modules_of,
    rewriting,
    rewritten,
    said,
)
from lora_check.faults._left_out import NOT_APPLIED, left_at_base, targets, telling
from lora_check.types import Comparison, Finding, Pairing, PatternFault, Plan, Verdict

FACTORS = ("A", "B", "embedding_A", "embedding_B")


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is written, what PEFT looks for, and what the difference is.

    doubtful  the names differ in a way that libraries mend while they load
    """

    written: str
    wanted: str
    why: str
    doubtful: bool = False


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding if what holds the base is what has such keys: paired all the same, or only after a rewriting."""
    return _paired(plan, comparisons) or _unpaired(plan, comparisons)


def _paired(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    asked = telling(comparisons)
    left = {one.tensor: one for one in asked if one.code == NOT_APPLIED}
    strange = {one.merged.name: key for one in plan.targets if (key := _strange(plan, one))}
    told = [strange[one.tensor] for one in asked if one.tensor in strange]
    if plan.orphans or not left or left.keys() != {one.tensor for one in asked if one.tensor in strange}:
        return ()
    # Names that only differ may be what the library of the model looks for: where all are left, they show nothing.
    if len(left) == len(asked) and any(key.doubtful for key in told):
        return ()
    where = left_at_base(list(left.values()), comparisons)
    return (
        _finding(comparisons, f"{where}, and the adapter's keys name them otherwise: {told[0].why}", left, told[0]),
    )


def _strange(plan: Plan, target: Pairing) -> Key | None:
    """The key of a target that a loader may not find."""
    stored = [(step.adapter, key) for step in target.steps for role, key in step.factors.items() if role in FACTORS]
    if not stored or target.base is None:
        return None
    adapter, key = plan.adapters[stored[0][0]], stored[0][1]
    module = target.base.name.removesuffix(".weight")
    if is_foreign(key, adapter):
        return Key(key, _wanted(key, module), adapter.foreign_prefix or "not as PEFT writes them")
    rewrite = rewriting([module_of(key)], [module])
    same = not rewrite or rewrite[0] == rewrite[1] or is_base_prefix(rewrite, modules_of(plan))
    if adapter.dialect != "peft" or not rewrite or same:
        return None
    return Key(key, _wanted(key, module), f"BASE has {said(rewrite)}", doubtful="" not in rewrite)


def _unpaired(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """The same where nothing could be paired: all keys name modules of BASE after one rewriting, and those hold it."""
    modules = {module_of(key) for _, key in plan.orphans}
    rewrite = rewriting(modules, modules_of(plan))
    trained = [key for index, key in plan.orphans if "_B." in f"{key}." and _is_set(plan, index, key)]
    if not rewrite or len({module_of(key) for key in trained}) < len(modules):
        return ()
    named = {rewritten(module, rewrite) for module in modules}
    weights = [one for one in comparisons if one.tensor.removesuffix(".weight") in named]
    if len(weights) < len(named) or any(one.verdict is not Verdict.VERIFIED for one in weights):
        return ()
    names, key = [one.tensor for one in weights], trained[0]
    told = Key(key, _wanted(key, rewritten(module_of(key), rewrite)), f"BASE has {said(rewrite)}")
    message = (
        f"the adapter's keys name nothing in BASE, which has {said(rewrite)}, and the {len(named)} modules they are "
    )
    return (_finding(comparisons, f"{message}for are left at the base", names, told),)


def _wanted(key: str, module: str) -> str:
    return f"{PREFIX}{module}{key[key.rfind('.lora_') :]}"


def _is_set(plan: Plan, index: int, key: str) -> bool:
    """Whether a factor has a number that is not zero."""
    return bool(plan.adapters[index].checkpoint.read(key).any())


def _finding(comparisons: Sequence[Comparison], message: str, tensors: Iterable[str], key: Key) -> Finding:
    count = {"targets": targets(comparisons)} if targets(comparisons) else {}
    told = {"as_written": key.written, "looked_for": key.wanted, "B": "not zero in the file", **count}
    return found(FAULT, message, tensors, **told)


FAULT = PatternFault(
    code="LC509",
    name="keys-not-matched",
    severity="error",
    summary="adapter keys that a loader does not match",
    help="rename the keys, or load the adapter into the class that it was trained on, and merge again",
    detect=detect,
    absorbs=("LC005", "LC101", "LC205", "LC501", "LC502", "LC503", "LC504", "LC505", "LC506", "LC507", "LC508"),
    verdict=Verdict.INCONCLUSIVE,
    causes=("M02",),
)
