"""LC214 head-stored-twice

What it is
MERGED holds an output head of its own beside the embedding that the configuration ties it to; BASE holds one tensor
for both. The head is the expected one, and the file is larger by it.

How it happens
The exporter walks names in place of storages, and writes a shared tensor under both: '9B became 10B'.
FSDP and DeepSpeed state dicts hold tied tensors twice.

How it is told
By the headers: a head that BASE does not store. Its numbers are checked as those of the embedding; where they differ,
another finding says so.

Evidence
bytes: what the second copy takes.

What to do
Nothing; to save the space, save with save_pretrained, which writes tied tensors once.

Seen in
arcee-ai/mergekit#390, arcee-ai/mergekit#385, EvolvingLMMs-Lab/lmms-engine#157, vllm-project/vllm#3323
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, listed
from lora_check.faults._sizes import spoken, total
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with the heads that were verified, where MERGED is configured to tie them."""
    right = {one.tensor for one in comparisons if one.verdict is Verdict.VERIFIED}
    heads = [name for name in plan.doubled if name in right]
    if not heads or plan.merged_config.get("tie_word_embeddings") is False:
        return ()
    size = total(plan.merged_metas[name] for name in heads)
    message = f"{listed(heads)} stored beside the embedding it is tied to: {spoken(size)} more, no other numbers"
    return (found(FAULT, message, heads, bytes=size),)


FAULT = PatternFault(
    code="LC214",
    name="head-stored-twice",
    severity="info",
    summary="a tied head that is stored a second time",
    help="save with save_pretrained, which writes tied tensors once, if the space matters",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M54",),
)
