"""LC411 trained-rows-elsewhere

What it is
The trained token rows are in the embedding, and in other rows than those that were trained.

How it happens
A script numbers the rows 0, 1, 2 as they lie in the adapter's file, or appends them after the last row.
The tokenizer of the merge lacks a token that the training had, or has one more: all rows move by one.
The rows are written in the order of their numbers, where the configuration lists them in another.

How it is told
W'[k] = S[j] reproduces the embedding, with rows k that are the trained ones moved by one, by as many as there are
of them, at the start, at the end or sorted.

Evidence
trained: the rows that were trained. written: those that hold their numbers.

What to do
Write each trained row to the number that trainable_token_indices gives it, with the tokenizer of the training.

Seen in
huggingface/peft#2376, huggingface/peft#3514
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._whole import trained, with_copies, worded
from lora_check.types import Case, LoadedStep, ValueFault

Tokens = tuple[int, ...]


def inject(case: Case) -> tuple[Case, ...]:
    """W'[k] = S[j], for each way in which k is not the row that was trained."""
    steps = [step for step in trained(case) if step.tokens]
    if len(steps) != 1:
        return ()
    (step,) = steps
    return tuple(_written(case, step, rows) for rows in dict.fromkeys(_others(step.tokens, case.rows)))


def _others(tokens: Tokens, rows: int) -> Iterator[Tokens]:
    """The rows that may have been taken for these."""
    count = len(tokens)
    shifts = (1, -1, count, -count)
    first, last = tuple(range(count)), tuple(range(rows - count, rows))
    for found in (first, last, tuple(sorted(tokens)), *(tuple(one + by for one in tokens) for by in shifts)):
        if found != tokens and all(0 <= one < rows for one in found):
            yield found


def _written(case: Case, step: LoadedStep, rows: Tokens) -> Case:
    told = {"trained": list(step.tokens), "written": list(rows)}
    moved = with_copies(case, lambda one: replace(one, tokens=rows) if one.tokens else one)
    return replace(moved, told=told)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which rows were written, and which were trained, if all tensors agree."""
    pairs = {(_rows(one["written"]), _rows(one["trained"])) for one in told}
    if len(pairs) > 1:
        return str(FAULT.summary)
    written, trained_rows = pairs.pop()
    return f"trained token rows written to rows {written}, not to {trained_rows}"


def _rows(rows: Sequence[int]) -> str:
    return worded(map(str, rows))


FAULT = ValueFault(
    code="LC411",
    name="trained-rows-elsewhere",
    severity="error",
    summary="trained token rows written to other rows",
    help="write each trained row to the number that trainable_token_indices gives it",
    inject=inject,
    tell=tell,
    kinds=("copy",),
    causes=("M48",),
)
