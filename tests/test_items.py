"""Pieces of work: each row once, whatever the workers; a mistake in any piece is found; shards divide the whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_check import items, pipeline, sources
from lora_check.registry import load
from lora_check.types import Pairing, Plan, Step, TensorMeta
from lora_check.work import Job

torch.set_num_threads(1)

RECIPES = load("recipes")
TIMING = ("seconds", "gb_per_second", "cpu_seconds", "read_ceiling_gb_per_second", "bound")


def pairing(rows: int, columns: int, recipe: str = "", number: int = 0, **changes: Any) -> Pairing:
    meta = TensorMeta(name=f"layers.{number}.weight", shape=(rows, columns), dtype="bfloat16")
    steps = (Step(recipe=RECIPES[recipe], adapter=0, factors={"A": "a", "B": "b"}),) if recipe else ()
    return Pairing(**{"merged": meta, "base": meta, "steps": steps, "module": meta.name, **changes})


# ------------------------------------------------------------------------------------------------------- pieces


@given(rows=st.integers(1, 4000), columns=st.integers(1, 60), size=st.integers(1, 5000))
def test_pieces_are_every_row_once_and_in_order(rows: int, columns: int, size: int) -> None:
    before, items.PIECE_BYTES = items.PIECE_BYTES, size
    try:
        spans = items.pieces(pairing(rows, columns, "lora-linear"))
    finally:
        items.PIECE_BYTES = before
    assert [row for span in spans for row in range(span.start, span.stop)] == list(range(rows))
    assert all((span.stop - span.start) * columns * 2 <= max(size, 2 * columns) for span in spans)


LARGE = 1 << 14


@pytest.mark.parametrize(
    ("one", "several"),
    [
        (pairing(LARGE, LARGE, "lora-linear"), True),
        (pairing(LARGE, LARGE), True),
        (pairing(LARGE, LARGE, "dora-linear"), False),
        (pairing(LARGE, LARGE, "pissa-base"), False),
        (pairing(LARGE, LARGE, undecidable="for a reason"), False),
        (pairing(LARGE, LARGE, wanted=(LARGE + 1, LARGE)), False),
        (pairing(LARGE, LARGE, base=None), False),
        (pairing(LARGE, LARGE, base=TensorMeta(name="b", shape=(LARGE, LARGE), dtype="float32")), False),
        (pairing(LARGE, LARGE, base=TensorMeta(name="b", shape=(LARGE, LARGE), dtype="bfloat16", codes="nf4")), None),
        (pairing(40, 60, "lora-linear"), False),
    ],
    ids=["target", "bystander", "norms", "whole", "undecidable", "resized", "no-base", "cast", "codes", "small"],
)
def test_only_tensors_whose_rows_stand_alone_are_divided(one: Pairing, several: bool | None) -> None:
    if several is not None:  # codes may be divided where a scheme decodes rows
        assert (len(items.pieces(one)) > 1) is several


@given(
    heights=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    count=st.integers(1, 9),
    size=st.sampled_from([1 << 10, 1 << 14, 1 << 26]),
)
def test_shards_are_every_item_once_in_order_and_even(heights: list[int], count: int, size: int) -> None:
    before, items.PIECE_BYTES = items.PIECE_BYTES, size
    try:
        plan = Plan(pairings=tuple(pairing(rows, 40, "lora-linear", n) for n, rows in enumerate(heights)))
        every = items.items(plan)
        shards = [items.shard(plan, every, number, count) for number in range(1, count + 1)]
        sizes = [sum(items.sizes_of(plan, one)) for one in shards]
        largest, total = max(items.sizes_of(plan, every)), sum(items.sizes_of(plan, every))
    finally:
        items.PIECE_BYTES = before
    assert [item for one in shards for item in one] == list(every)
    assert total == sum(2 * 2 * 40 * rows for rows in heights)
    assert all(abs(one - total / count) <= largest + 1 for one in sizes)


# ---------------------------------------------------------------------------------------------------- one report


def plain(report: Any) -> str:
    told = report.as_dict()
    for key in TIMING:
        told["summary"].pop(key, None)
    return json.dumps(told, sort_keys=True)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of a toy is several pieces."""
    monkeypatch.setattr(items, "PIECE_BYTES", 128)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_report_is_the_same_whatever_the_workers(world: Any, dtype: str, divided: None) -> None:
    args = world("llama-all-seven", dtype).args
    plan = pipeline.plan(*args)
    assert len(items.items(plan)) > 3 * len(plan.pairings)
    reports = [plain(pipeline.check(*args, jobs=jobs)) for jobs in (1, 2, 7)]
    assert len(set(reports)) == 1
    assert json.loads(reports[0])["verdict"] == "verified"


def test_a_mistake_in_any_piece_is_found_and_told_as_in_one(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    base, adapters, merged = world("llama-all-seven", "bf16").args
    names = [one.merged.name for one in pipeline.plan(base, adapters, merged).pairings if one.kind == "target"]
    bystander = next(one.merged.name for one in pipeline.plan(base, adapters, merged).pairings if one.kind != "target")
    for name, row in ((names[0], 0), (names[1], -1), (names[2], 7), (bystander, 1)):
        tensors = load_file(merged / "model.safetensors")
        tensors[name][row] += 1
        told = []
        for size in (1 << 26, 128):
            monkeypatch.setattr(items, "PIECE_BYTES", size)
            report = pipeline.check(base, adapters, tensors)
            assert [one.tensor for one in report.comparisons if one.verdict.value == "refuted"] == [name]
            told.append([(one.code, one.tensors, one.message) for one in report.findings])
        assert told[0] == told[1]


@pytest.mark.parametrize("recipe", ["", "lora-linear"], ids=["bystander", "target"])
def test_a_tensor_of_which_no_row_was_seen_is_not_done(recipe: str) -> None:
    one = pairing(8, 8, recipe)
    asked = Job(None, (), None, Plan(pairings=(one,)), {})
    assert asked.joined(one, []) is None
    assert asked.joined(one, [None]) is None


# -------------------------------------------------------------------------------------------------- row sources


class Rows:
    """A tensor that counts the rows it gives away."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.read = tensor, 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def __getitem__(self, span: slice) -> torch.Tensor:
        found = self.tensor[span]
        self.read += len(found)
        return found


class Checkpoint:
    """One tensor, by rows."""

    location, config = "memory", {}

    def __init__(self, tensor: torch.Tensor) -> None:
        self.source = Rows(tensor)

    def rows(self, name: str) -> Rows:
        return self.source

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(name)


@pytest.mark.parametrize(
    ("shape", "stacked"),
    [((6,), False), *(((6, *rest), stacked) for rest in [(5,), (5, 4), (5, 2, 3)] for stacked in (False, True))],
)
def test_a_source_by_rows_is_the_matrix_of_the_tensor(shape: tuple[int, ...], stacked: bool) -> None:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    checkpoint = Checkpoint(tensor)
    seen, whole = sources.matrix(checkpoint, "x", stacked), sources.rows_of(tensor, stacked)
    assert tuple(seen.shape) == tuple(whole.shape)
    height = whole.shape[0]
    for start in range(0, height, 3):
        for stop in range(start, height + 2, 2):
            assert torch.equal(seen[slice(start, stop)], whole[start:stop])
    checkpoint.source.read = 0
    assert len(seen[slice(0, 1)]) == checkpoint.source.read == 1
