"""Verdicts and answers of the latency benchmark, on results made by hand, with figures worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, log, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from benchmarks.latency.answers import sentences
from benchmarks.latency.crossing import crossing
from benchmarks.latency.nouns import Ceilings, Cell, Gate, Measured, Results, Row, Timing
from benchmarks.latency.verdicts import Judgement, invalid, judged
from lora_check.errors import InputError

GRAPH, WALL, BUSY = "graph_replay", "eager_wall", "device_busy"
H200 = Ceilings(
    read=4.3e12,
    copy=4.3e12,
    matmul={"bfloat16": 790e12, "float32": 60e12},
    launch={GRAPH: 1.5e-6, WALL: 4e-6, BUSY: 1e-6},
)
SQUARE = ((4096, 4096),)
"""Its floor: 2 x 4096^2 bytes at 4.3 TB/s are 7.803 us; the factors of rank 16 add 0.06096 us, 0.78 %."""
GOOD = Gate(share=0.2)
WOBBLE = (1.002, 0.999, 1.0, 1.001, 0.997)
"""Merged again over merged, round by round: 60 % of |ratio - 1| lie within 0.0014."""
SPREAD = 0.0014
ONE = Cell(workload="linear", shape="square", rank=16, targets=("q_proj",))


def timing(seconds: float, wobble: Sequence[float] = (1, 1, 1, 1, 1)) -> Timing:
    return Timing(samples=tuple(seconds * one for one in wobble))


def row(name: str, traffic: str = "two", kernels: int | None = None, gate: Gate | None = GOOD, **clocks: float) -> Row:
    adapter = "float32" if name == "peft_float32" else ""
    return Row(
        backend=name,
        about=name,
        adapter=adapter,
        traffic=traffic,
        gate=gate,
        kernels=kernels,
        clocks={clock: timing(seconds) for clock, seconds in clocks.items()},
    )


def yardsticks(kernels: int | None = None, wobble: Sequence[float] = WOBBLE, **clocks: float) -> tuple[Row, Row]:
    merged = replace(row("merged", "merged", kernels, **clocks), merged=True)
    twice = {clock: timing(seconds, wobble) for clock, seconds in clocks.items()}
    return merged, replace(merged, again=True, clocks=twice)


def cell_of(*rows: Row, cell: Cell = ONE, modules=SQUARE, merge: float = 0.0) -> Measured:
    return Measured(cell=cell, modules=modules, rows=rows, merge=timing(merge) if merge else Timing())


def said(measured: Measured, name: str, clock: str = GRAPH) -> Judgement:
    return judged(measured, H200)[name, False, clock]


# ------------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("us", "word"), [(7.79, "invalid"), (7.799, "at floor"), (7.81, "at floor"), (7.82, "ok"), (9.0, "ok")]
)
def test_merged_beside_the_time_of_its_bytes(us, word):
    """The floor is 7.803 us and the A/A 0.14 %: from 7.792 to 7.814 us it cannot be told from the floor."""
    found = said(cell_of(*yardsticks(graph_replay=us * 1e-6)), "merged")
    assert found.word == word
    assert found.floor == pytest.approx(2 * 4096**2 / 4.3e12)
    assert found.share == pytest.approx(found.floor / (us * 1e-6))
    assert found.spread == pytest.approx(SPREAD)


@pytest.mark.parametrize(
    ("percent", "traffic", "word"),
    [
        (0.1, "fused", "noisy"),
        (-0.1, "compiled", "noisy"),
        (0.1, "two", "invalid"),
        (0.3, "two", "invalid"),  # its factors alone take 0.06096 us of 9: 0.677 %
        (-14, "two", "invalid"),
        (-14, "merge", "invalid"),
        (-5, "fused", "ok"),
        (-5, "compiled", "ok"),
        (-14, "fused", "invalid"),  # 7.74 us, and weights and factors take 7.864
        (0.3, "fused", "at floor"),
        (0.6, "two", "at floor"),  # below 0.677 by less than the A/A
        (0.9, "two", "at floor"),
        (1.2, "fused", "ok"),
        (100, "two", "ok"),
    ],
)
def test_overhead_over_a_merged_of_nine_microseconds(percent, traffic, word):
    rows = (*yardsticks(graph_replay=9e-6), row("it", traffic, graph_replay=9e-6 * (1 + percent / 100)))
    found = said(cell_of(*rows), "it")
    assert found.word == word, found.reason
    assert found.overhead == pytest.approx(percent / 100)
    assert found.least == pytest.approx(16 * 8192 * 2 / 4.3e12 / 9e-6)
    assert found.reason


def test_a_wide_a_a_finds_nothing_at_its_floor():
    """9 us are within 20 % of the floor of 7.8, and a run that coarse cannot tell the floor from anything."""
    wide = cell_of(*yardsticks(graph_replay=9e-6, wobble=(1.3, 0.8, 1.2, 0.7, 1.0)))
    assert said(wide, "merged").word == "ok"


def test_a_hot_cell_has_no_floor_of_bytes():
    """33.5 MB in 3 us would be 11 TB/s: more than memory gives, and nothing unheard of for a cache."""
    rows = (*yardsticks(graph_replay=3e-6), row("it", graph_replay=3.3e-6))
    assert said(cell_of(*rows), "merged").word == "invalid"
    hot = cell_of(*rows, cell=replace(ONE, cache="hot"))
    assert said(hot, "merged").word == "ok"
    assert said(hot, "it").word == "launch-bound"
    assert said(hot, "merged").floor == pytest.approx(2 * 4096**2 / 790e12)
    too_fast = cell_of(*yardsticks(graph_replay=0.04e-6), cell=replace(ONE, cache="hot"))
    assert said(too_fast, "merged").word == "invalid"


def test_nothing_is_compared_with_an_impossible_yardstick():
    found = said(cell_of(*yardsticks(graph_replay=7e-6), row("it", graph_replay=9e-6)), "it")
    assert (found.word, found.reason[:12]) == ("invalid", "its yardstic")


@pytest.mark.parametrize(
    "gate", [None, Gate(share=nan), Gate(share=1.01), Gate(share=0.2, wrong="it returns the base")], ids=str
)
def test_a_time_of_an_output_that_was_not_found_right_is_invalid(gate):
    rows = (*yardsticks(graph_replay=9e-6), row("it", gate=gate, graph_replay=18e-6))
    assert said(cell_of(*rows), "it").word == "invalid"
    right = (*yardsticks(graph_replay=9e-6), row("it", gate=GOOD, graph_replay=18e-6))
    assert said(cell_of(*right), "it").word == "ok"


def test_without_an_a_a_nothing_is_claimed_but_the_impossible():
    merged, _ = yardsticks(graph_replay=9e-6)
    found = cell_of(merged, row("slow", graph_replay=18e-6), row("fast", graph_replay=7e-6))
    assert said(found, "slow").word == "noisy"
    assert "no A/A" in said(found, "slow").reason
    assert said(found, "fast").word == "invalid"


def test_a_wide_a_a_makes_a_row_say_nothing():
    wide = (1.3, 0.8, 1.2, 0.7, 1.0)
    rows = (*yardsticks(graph_replay=9e-6, wobble=wide), row("it", graph_replay=9e-6 * 1.15))
    assert said(cell_of(*rows), "it").word == "noisy"
    large = (*yardsticks(graph_replay=9e-6, wobble=wide), row("it", graph_replay=9e-6 * 3))
    assert said(cell_of(*large), "it").word == "ok"


@pytest.mark.parametrize(("more", "word"), [(2, "launch-bound"), (1, "ok")])
def test_launches_that_explain_more_than_half(more, word):
    """+40 % of 9 us are 3.6 us; two launches of 1.5 us are 3, one is not half of it."""
    rows = (*yardsticks(kernels=1, graph_replay=9e-6), row("it", "fused", 1 + more, graph_replay=9e-6 * 1.4))
    found = said(cell_of(*rows), "it")
    assert found.word == word
    assert word == "ok" or "2 more kernels than merged (seen), 1.5 us each, of 3.6 us" in found.reason


def test_kernels_are_counted_where_nobody_saw_them():
    rows = (*yardsticks(graph_replay=9e-6), row("it", "two", graph_replay=9e-6 * 1.4))
    assert "2 more kernels than merged (counted)" in said(cell_of(*rows), "it").reason


@pytest.mark.parametrize(("percent", "word"), [(15, "traffic-bound"), (40, "ok")])
def test_bytes_that_may_explain_more_than_half(percent, word):
    """At 2,048 tokens two kernels pass bytes worth 11.8 us over memory: most of 13 us, less than half of 34.8."""
    cell = replace(ONE, length=2048)
    rows = (*yardsticks(kernels=1, graph_replay=87e-6), row("it", "two", 2, graph_replay=87e-6 * (1 + percent / 100)))
    found = said(cell_of(*rows, cell=cell), "it")
    assert found.word == word, found.reason
    assert word == "ok" or "up to 11.8 us, of 13 us over merged" in found.reason


def test_a_device_that_waits_for_its_host_is_launch_bound():
    rows = (*yardsticks(kernels=1, eager_wall=40e-6, device_busy=9e-6), row("it", "two", 3, eager_wall=60e-6))
    found = judged(cell_of(*rows), H200)
    assert found["merged", False, WALL].launches == pytest.approx(31 / 40)
    assert found["merged", False, WALL].word == "launch-bound"
    assert found["merged", False, BUSY].word == "ok"
    assert found["it", False, WALL].launches is None


def test_a_processor_waits_for_nobody():
    """Without kernels the wall clock beyond the busy one is other processes."""
    found = judged(cell_of(*yardsticks(eager_wall=40e-6, device_busy=9e-6)), H200)
    assert found["merged", False, WALL].launches is None
    assert found["merged", False, WALL].word == "ok"


def test_n_merged_copies_may_be_beaten():
    """16 copies of the weights take 125 us, one base with 16 adapters needs 8.78."""
    cell = replace(ONE, workload="mixed", batch=16, adapters=16)
    rows = (*yardsticks(graph_replay=130e-6), row("it", "gathered", graph_replay=14e-6), row("not", graph_replay=8e-6))
    found = judged(cell_of(*rows, cell=cell), H200)
    assert found["it", False, GRAPH].word == "ok"
    assert found["not", False, GRAPH].word == "invalid"
    assert found["it", False, GRAPH].floor == pytest.approx(2 * (4096**2 + 16 * 16 * 8192) / 4.3e12)


def test_rows_without_samples_are_not_judged_and_unknown_traffic_is_said():
    silent = replace(row("it"), clocks={GRAPH: Timing(missing="no graph")}, missing="no compiler")
    assert set(judged(cell_of(*yardsticks(graph_replay=9e-6), silent), H200)) == {
        ("merged", False, GRAPH),
        ("merged", True, GRAPH),
    }
    with pytest.raises(InputError, match="'magic'"):
        judged(cell_of(*yardsticks(graph_replay=9e-6), row("it", "magic", graph_replay=9e-6)), H200)


def test_invalid_times_are_counted():
    one = cell_of(*yardsticks(graph_replay=9e-6), row("it", graph_replay=5e-6), row("that", graph_replay=12e-6))
    assert invalid([judged(one, H200), judged(one, H200)]) == 2


@settings(max_examples=80, deadline=None)
@given(
    merged=some.floats(1e-6, 1e-4),
    ratio=some.floats(0.2, 5),
    traffic=some.sampled_from(["two", "eager", "fused", "merge"]),
    cold=some.booleans(),
    wobble=some.floats(1e-4, 0.2),
)
def test_no_word_but_invalid_for_what_no_device_can_do(merged, ratio, traffic, cold, wobble):
    """Whatever was measured: seconds under the floor beyond the A/A are never called anything else, nor the reverse."""
    cell = replace(ONE, cache="cold" if cold else "hot")
    twins = yardsticks(graph_replay=merged, wobble=(1 + wobble,) * 5)
    found = said(cell_of(*twins, row("it", traffic, graph_replay=merged * ratio), cell=cell), "it")
    bytes_, flops = 2 * (4096**2 + 16 * 8192) / 4.3e12, 2 * (4096**2 + 16 * 8192) / 790e12
    floor = max(bytes_, flops) if cold else flops
    if merged * ratio < floor * (1 - wobble) * (1 - 1e-9):
        assert found.word == "invalid"
    elif ratio > 1 + 0.01 + wobble and merged > floor:
        assert found.word != "invalid"
    if abs(ratio - 1) < wobble * (1 - 1e-9):
        assert found.word in ("noisy", "invalid")


# ------------------------------------------------------------------------------------------------------ answers

LAYER = ((4096, 4096), (1024, 4096))
"""20.97 M weights, 41.9 MB; an adapter of rank 16 on it 213 thousand parameters, 426 kB."""
HEADER = {"device": {"kind": "cuda", "memory": 150_000_000_000}}


def model(cell: Cell, milli: float, *rows: Row, merge: float = 6.8e-3, kernels: int | None = 100, **more) -> Measured:
    twins = yardsticks(kernels, graph_replay=milli * 1e-3, **more)
    return cell_of(*twins, *rows, cell=cell, modules=LAYER, merge=merge)


DECODE = Cell(workload="model", shape="llama", rank=16, targets=("q_proj", "k_proj"), context=512)
PREFILL = replace(DECODE, length=2048, context=0)


def results(*cells: Measured, environment=HEADER) -> Results:
    return Results(environment=environment, ceilings=H200, cells=cells)


@pytest.fixture
def told() -> list[str]:
    decode = model(
        DECODE,
        4.0,
        row("two_gemm", "two", 300, graph_replay=5e-3, eager_wall=10e-3, device_busy=4.9e-3),
        row("peft_float32", "peft", 500, graph_replay=7e-3),
        row("peft_storage", "eager", 400, graph_replay=5.6e-3),
        row("triton_fused", "fused", 100, graph_replay=4.004e-3),
        row("broken", "two", 300, graph_replay=1e-9),
        row("lucky", "fused", 100, graph_replay=3.6e-3),
        eager_wall=6e-3,
        device_busy=3.9e-3,
    )
    prefill = model(PREFILL, 36.4, row("two_gemm", "two", 300, graph_replay=40.04e-3))
    return sentences(results(prefill, decode))


def only(told: Sequence[str], question: str) -> list[str]:
    found = [one.removeprefix(f"{question}: ") for one in told if one.startswith(f"{question}: ")]
    assert found, f"silence on {question}"
    return found


def test_overhead_of_every_backend_by_each_clock(told):
    graph, wall = only(told, "Decoding")
    assert graph == (
        "model llama, 1 token, r = 16, 2 modules, by graph_replay: merged 4 ms (A/A 0.14 %); over it two_gemm +25.0 %, "
        "peft_float32 +75.0 %, peft_storage +40.0 %, triton_fused none that this run can see, broken invalid, "
        "lucky -10.0 %."
    )
    assert wall.endswith("by eager_wall: merged 6 ms (A/A 0.14 %); over it two_gemm +66.7 %.")
    (prefill,) = only(told, "Prefill")
    assert "2,048 tokens" in prefill
    assert "two_gemm +10.0 %" in prefill


def test_part_of_the_overhead_that_is_launches(told):
    """10 - 6 = 4 ms over merged, of which the device works 4.9 - 3.9 = 1: 75 % is waiting; 200 x 4 us are 0.8 ms."""
    (one,) = only(told, "Launches")
    assert "the device waits 35.0 % of the time of merged" in one
    assert "two_gemm 75.0 % of 4 ms is waiting for launches (200 more kernels at 4 us are 800 us)" in one


def test_when_a_merge_has_paid_for_itself(told):
    """6.8 ms over what each saves: 1, 3, 1.6 ms a token; 3.64 ms a prompt. Nothing seen: 6.8 ms / (0.0014 x 4 ms)."""
    decode, _, prefill = only(told, "Merging pays")
    assert "merging on the device takes 6.8 ms" in decode
    assert "two_gemm 7, peft_float32 3, peft_storage 5, triton_fused not before 1,215 (it saves nothing" in decode
    assert "broken invalid, lucky never (merged is slower)" in decode
    assert prefill.endswith("two_gemm 2.")
    assert "prompts of 2,048 tokens" in prefill


def test_a_merge_through_files_and_one_that_has_paid_at_once():
    """83.9 MB read and written at 1 GB/s take 83.9 ms, 84 times the saved millisecond."""
    one = model(DECODE, 4.0, row("two_gemm", "two", 300, graph_replay=5e-3), merge=0.5e-3)
    first, second, *_ = only(sentences(results(one), disk=1e9), "Merging pays")
    assert first.endswith("two_gemm already at 1.")
    assert "a disk of 1 GB/s" in second
    assert second.endswith("two_gemm 84.")


def test_what_the_dtype_of_the_adapter_costs(told):
    """7 over 5.6 ms."""
    (one,) = only(told, "Adapter dtype")
    assert "peft_float32 over peft_storage: +25.0 %" in one


def test_bytes_of_adapters_and_how_many_fit(told):
    """213 thousand parameters x 2; 41.9 MB x 3576 are 150 GB; (150e9 - 41.9e6) / 425984."""
    (one,) = only(told, "Several adapters, memory")
    parameters = 16 * (8192 + 5120)
    copies, adapters = 150_000_000_000 // 41_943_040, (150_000_000_000 - 41_943_040) // (2 * parameters)
    assert "an adapter of r = 16 is 426 kB (852 kB in float32)" in one
    assert "41.9 MB, 98 times as much" in one
    assert f"150 GB hold {copies:,} merged copies, or one base and {adapters:,} adapters" in one


def test_memory_of_the_device_is_asked_for(told):
    one = model(DECODE, 4.0, row("two_gemm", "two", 300, graph_replay=5e-3))
    (silent,) = only(sentences(results(one, environment={})), "Several adapters, memory")
    assert "not measured: the memory of the device" in silent
    assert "not measured" not in only(told, "Several adapters, memory")[0]


def mixed(n: int, ratio: float) -> Measured:
    cell = Cell(workload="mixed", shape="llama/q", batch=64, rank=16, adapters=n, targets=("q_proj",))
    return cell_of(*yardsticks(graph_replay=1e-3), row("gathered", "gathered", graph_replay=1e-3 * ratio), cell=cell)


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ({4: 1.3, 8: 0.9, 2: 1.5}, "from about n = 7 on (interpolated between 4 and 8)"),
        ({2: 0.9, 4: 0.8}, "already at n = 2, the least measured"),
        ({2: 1.2, 4: 1.1}, "not at n = 4, the most measured"),
        ({2: 0.9, 4: 1.1}, "not at n = 4, the most measured (though at fewer)"),
        ({2: 0.9995, 4: 0.5}, "from about n = 2 on (interpolated between 2 and 4)"),
        ({2: 0.9}, "already at n = 2, the only one measured"),
    ],
    ids=str,
)
def test_adapters_from_which_unmerged_serving_wins(ratios, words):
    """4 + 4 x 0.3 / 0.4 = 7. An overhead within the A/A is a tie, and a tie is no win."""
    told = sentences(results(*(mixed(n, ratio) for n, ratio in ratios.items())))
    (one,) = only(told, "Several adapters, time")
    assert one.startswith(f"n merged copies are beaten by gathered {words} (mixed llama/q, 64 x 1 tokens, r = 16,")


def test_tokens_from_which_merging_inside_wins():
    """Half way between 1,024 and 4,096 by the logarithm is 2,048; by counted bytes 2 x 4096 / 3 = 2,731."""
    cells = [
        cell_of(
            *yardsticks(graph_replay=60e-6),
            row("two_gemm", "two", graph_replay=100e-6),
            row("dora", "dora", graph_replay=400e-6),
            row("merge_inside", "merge", graph_replay=100e-6 * ratio),
            cell=replace(ONE, length=tokens, rank=rank),
        )
        for tokens, ratio in ((1024, 1.2), (4096, 0.8))
        for rank in (64, 16)
    ]
    ceilings = replace(H200, matmul={"bfloat16": 1e18, "float32": 1e18})
    told = sentences(Results(environment=HEADER, ceilings=ceilings, cells=tuple(cells)))
    (one,) = only(told, "Merging inside the forward")
    assert "it beats two_gemm from about T = 2,048 on (interpolated between 1,024 and 4,096)" in one
    assert "by counted bytes at 2,731" in one
    assert "r = 16" in one
    assert "dora" not in one


def test_every_question_that_was_not_measured_says_what_is_missing():
    told = sentences(results())
    questions = ["Decoding", "Prefill", "Launches", "Merging pays", "Several adapters, time"]
    for question in [*questions, "Several adapters, memory", "Adapter dtype", "Merging inside the forward"]:
        assert all(one.startswith("not measured: ") and len(one) > 30 for one in only(told, question))
    assert told[-1] == "Invalid: 0 of 0 times."


def test_invalid_times_are_told_and_not_used(told):
    assert told[-1].startswith("Invalid: 1 of ")
    assert told[-1].endswith("none of them used above.")
    everything = "\n".join(told)
    assert "broken invalid" in everything
    assert "broken -" not in everything


def test_modules_speak_only_where_no_model_and_no_block_do():
    rows = (*yardsticks(graph_replay=9e-6), row("two_gemm", graph_replay=18e-6))
    module, block = cell_of(*rows), cell_of(*rows, cell=replace(ONE, workload="block", shape="layer"))
    whole = model(DECODE, 4.0, row("two_gemm", "two", 300, graph_replay=5e-3))
    for cells, level in (((module, block, whole), "model"), ((module, block), "block"), ((module,), "linear")):
        (one,) = only(sentences(results(*cells)), "Decoding")
        assert one.startswith(level)


def test_the_cell_that_a_reader_would_expect_speaks_for_a_shape():
    rows = (*yardsticks(graph_replay=9e-6), row("two_gemm", graph_replay=18e-6))
    others = [
        replace(ONE, rank=64),
        replace(ONE, cache="hot"),
        replace(ONE, batch=8),
        replace(ONE, adapters=2, batch=2),
    ]
    slower = (*yardsticks(graph_replay=9e-6), row("two_gemm", graph_replay=27e-6))
    for cell in others:
        for cells in ((cell_of(*rows), cell_of(*slower, cell=cell)), (cell_of(*slower, cell=cell), cell_of(*rows))):
            (one,) = only(sentences(results(*cells)), "Decoding")
            assert one.startswith("linear square, 1 token, r = 16,")
            assert one.endswith("two_gemm +100.0 %.")


def test_a_cell_with_an_impossible_yardstick_does_not_speak():
    rows = (*yardsticks(graph_replay=5e-6), row("two_gemm", graph_replay=18e-6))
    assert only(sentences(results(cell_of(*rows))), "Decoding")[0].startswith("not measured: ")


def test_single_modules_speak_first_of_merging_inside():
    rows = (row("two_gemm", graph_replay=18e-6), row("merge_inside", "merge", graph_replay=30e-6))
    cells = [ONE, replace(ONE, workload="block", shape="layer")]
    (one,) = only(
        sentences(results(*(cell_of(*yardsticks(graph_replay=9e-6), *rows, cell=cell) for cell in cells))),
        "Merging inside the forward",
    )
    assert "(linear square" in one


def test_a_processor_answers_by_its_own_seconds():
    rows = (*yardsticks(device_busy=9e-3, eager_wall=20e-3), row("two_gemm", device_busy=12e-3, eager_wall=15e-3))
    told = sentences(results(cell_of(*rows)))
    (one,) = only(told, "Decoding")
    assert "by device_busy: merged 9 ms" in one
    assert "two_gemm +33.3 %" in one
    assert only(told, "Launches")[0].startswith("not measured: ")


@settings(max_examples=60, deadline=None)
@given(where=some.floats(1.2, 60), points=some.sets(some.integers(1, 64), min_size=2, max_size=8))
def test_a_straight_line_crosses_where_it_crosses(where, points):
    """Of y = where - x every interpolation finds `where`; nothing is said of what lies beyond the measured."""
    line = [(float(x), where - x) for x in sorted(points)]
    words = crossing(line, "n")
    if min(points) > where:
        assert words.startswith("already at")
    elif max(points) <= where:
        assert words.startswith("not at")
    else:
        assert words.startswith(f"from about n = {where:,.0f} on")


def test_a_line_in_the_logarithm_is_not_one_in_the_tokens():
    points = [(1024.0, 0.5), (4096.0, -0.5)]
    assert "= 2,560 on" in crossing(points, "T")
    assert "= 2,048 on" in crossing(points, "T", log, lambda x: 2.718281828459045**x)
    assert inf not in dict(points)
