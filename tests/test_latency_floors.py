"""Floors and ceilings of the latency benchmark: counted bytes and FLOPs, golden percentages, and what may never be."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from benchmarks.latency import ceilings as measuring
from benchmarks.latency.floors import (
    beyond,
    expected,
    hard,
    launch_share,
    least_overhead,
    peak,
    tokens_to_merge,
)
from benchmarks.latency.nouns import Ceilings, Cell, Clock, Place
from benchmarks.latency.traffic import TRAFFIC, Module, kernels, of
from lora_check.errors import InputError

H200 = Ceilings(
    read=4.3e12, copy=4.3e12, matmul={"bfloat16": 790e12, "float32": 60e12}, launch={"graph_replay": 1.5e-6}
)
LLAMA = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
"""(N, K) of q, k, v, o, gate, up, down of a layer of Llama-3-8B."""


def high(traffic: str, T: int, K: int, N: int, r: int = 16, adapter: str = "") -> float:
    return expected(kernels(traffic, [Module(T=T, K=K, N=N, r=r, adapter=adapter)]), H200, cold=True)[1]


def over(traffic: str, T: int, K: int, N: int, r: int = 16) -> float:
    """Percent over merged, as the tables print it."""
    adapter = "float32" if traffic == "peft" else ""
    return 100 * (high(traffic, T, K, N, r, adapter) / high("merged", T, K, N) - 1)


@pytest.mark.parametrize(
    ("K", "N", "percents"),
    [
        (4096, 4096, "0.39 0.78 1.56 3.12 6.25"),
        (4096, 1024, "0.98 1.95 3.91 7.81 15.62"),
        (4096, 14336, "0.25 0.50 1.00 2.01 4.02"),
        (14336, 4096, "0.25 0.50 1.00 2.01 4.02"),
        (8192, 8192, "0.20 0.39 0.78 1.56 3.12"),
        (8192, 1024, "0.88 1.76 3.52 7.03 14.06"),
        (8192, 28672, "0.13 0.25 0.50 1.00 2.01"),
        (3584, 3584, "0.45 0.89 1.79 3.57 7.14"),
        (3584, 512, "1.79 3.57 7.14 14.29 28.57"),
        (3584, 18944, "0.27 0.53 1.06 2.12 4.25"),
        (1024, 2048, "1.17 2.34 4.69 9.38 18.75"),
        (5120, 8192, "0.25 0.51 1.02 2.03 4.06"),
    ],
)
def test_least_an_adapter_costs_at_any_rank(K, N, percents):
    """r (1/K + 1/N), from the FLOPs of a long prefill and from the weights of a single token alike."""
    for rank, percent in zip((8, 16, 32, 64, 128), percents.split(), strict=True):
        assert f"{over('fused', 8192, K, N, rank):.2f}" == percent
        (plain,), (full,) = (TRAFFIC[name](Module(T=1, K=K, N=N, r=rank)) for name in ("merged", "fused"))
        assert f"{100 * (full.weights / plain.weights - 1):.2f}" == percent


GOLDEN = {
    ("q", 1): ("7.81", ".78", "0.9", "1.0", "2.0"),
    ("q", 8): ("7.83", ".78", "1.4", "2.1", "5.3"),
    ("q", 32): ("7.93", ".77", "3.1", "6.2", "16"),
    ("q", 128): ("8.29", ".74", "9.6", "21", "57"),
    ("q", 512): ("21.7", ".78", "13.8", "32", "86"),
    ("q", 2048): ("87.0", ".78", "13.6", "32", "85"),
    ("q", 8192): ("348", ".78", "13.5", "31", "85"),
    ("k", 1): ("1.95", "1.95", "2.1", "2.2", "4.7"),
    ("k", 32): ("2.03", "1.9", "6.4", "9.4", "29"),
    ("k", 128): ("2.26", "1.7", "18", "29", "95"),
    ("k", 512): ("5.44", "1.95", "28", "46", "154"),
    ("gate", 1): ("27.3", ".50", "0.6", "0.7", "1.4"),
    ("gate", 2048): ("304", ".50", "10.3", "28", "69"),
    ("down", 32): ("27.6", ".50", "1.7", "2.6", "8.0"),
    ("down", 128): ("28.4", ".48", "5.2", "8.6", "28"),
    ("down", 8192): ("1218", ".50", "7.1", "12", "40"),
}
SIZES = {"q": (4096, 4096), "k": (4096, 1024), "gate": (4096, 14336), "down": (14336, 4096)}


@pytest.mark.parametrize(("name", "T"), GOLDEN)
def test_every_implementation_at_rank_16(name, T):
    """Base time in us; percent of ideal, two kernels, eager, PEFT in fp32 over it: each digit as it was printed."""
    us, *percents = GOLDEN[name, T]
    K, N = SIZES[name]
    assert abs(high("merged", T, K, N) * 1e6 - float(us)) <= half_a_digit(us)
    for traffic, percent in zip(("fused", "two", "eager", "peft"), percents, strict=True):
        assert abs(over(traffic, T, K, N) - float(percent)) <= half_a_digit(percent), traffic


def half_a_digit(number: str) -> float:
    """Of the last printed place, and a little for the number that was rounded from a tie."""
    return 0.5000001 * 10.0 ** -len(number.partition(".")[2])


@pytest.mark.parametrize(("K", "N", "T"), [(4096, 4096, 202), (4096, 1024, 237), (4096, 14336, 195), (8192, 8192, 193)])
def test_tokens_from_which_merged_is_bound_by_flops(K, N, T):
    for tokens, computing in ((T - 1, False), (T + 1, True)):
        (one,) = TRAFFIC["merged"](Module(T=tokens, K=K, N=N, r=0))
        assert (one.flops / 790e12 > (one.weights + one.passing) / 4.3e12) is computing


@pytest.mark.parametrize(
    ("traffic", "ranks", "percents"),
    [
        ("two", (8, 16, 32, 64, 128, 256), "13.5 13.6 13.7 13.9 14.3 16.1"),
        ("eager", (8, 256), "31.5 34.9"),
        ("peft", (8, 16, 32, 64, 128, 256), "85 85 88 108 150 232"),
    ],
)
def test_rank_matters_in_prefill_where_the_adapter_is_wide(traffic, ranks, percents):
    for rank, percent in zip(ranks, percents.split(), strict=True):
        assert abs(over(traffic, 2048, 4096, 4096, rank) - float(percent)) <= half_a_digit(percent)


@pytest.mark.parametrize(
    ("K", "N", "two", "eager", "us"),
    [
        (4096, 4096, 2731, 1170, "15.6"),
        (4096, 1024, 1365, 819, "3.9"),
        (4096, 14336, 3584, 1303, "54.6"),
        (14336, 4096, 5213, 3018, "54.6"),
        (8192, 8192, 5461, 2341, "62.4"),
        (8192, 28672, 7168, 2607, "218"),
        (28672, 8192, 10426, 6036, "218"),
    ],
)
def test_tokens_from_which_merging_inside_pays(K, N, two, eager, us):
    assert round(tokens_to_merge(K, N, "two")) == two
    assert round(tokens_to_merge(K, N, "eager")) == eager
    merge = TRAFFIC["merge"](Module(T=1, K=K, N=N, r=0))[0]
    seconds = expected([merge], H200, cold=True)[1]
    assert abs(seconds * 1e6 - float(us)) <= half_a_digit(us)


def test_whole_llama_with_its_head():
    """32 layers and a row of logits: 36.4 ms at 2,048 tokens; two kernels add 10.5 %, eager 24.9, the ideal 0.60."""
    modules = of(Cell(workload="model", shape="llama", length=2048), LLAMA * 32)
    head = 2 * 128256 * 4096 / 4.3e12
    seconds = {name: expected(kernels(name, modules), H200, cold=True)[1] + head for name in ("merged", "two", "eager")}
    assert f"{seconds['merged'] * 1e3:.1f}" == "36.4"
    assert f"{100 * (seconds['two'] / seconds['merged'] - 1):.1f}" == "10.5"
    assert f"{100 * (seconds['eager'] / seconds['merged'] - 1):.1f}" == "24.9"
    assert f"{100 * least_overhead(modules, H200):.2f}" == "0.60"


def roofline(T: float, K: int, N: int, r: int) -> dict[str, float]:
    """Seconds by the formulas as they stand on paper, e = 2 and fp32 adapters where they are PEFT's."""
    P, W, slow = 790e12, 4.3e12, 60e12
    merged = max(2 * T * K * N / P, 2 * (K * N + T * K + T * N) / W)
    shrink = max(2 * T * K * r / P, 2 * (T * K + r * K + T * r) / W)
    return {
        "merged": merged,
        "fused": max(2 * T * (K * N + r * (K + N)) / P, 2 * (K * N + r * (K + N) + T * K + T * N) / W),
        "two": merged + shrink + max(2 * T * N * r / P, 2 * (T * r + r * N + 2 * T * N) / W),
        "eager": merged + shrink + max(2 * T * N * r / P, 2 * (T * r + r * N + T * N) / W) + 10 * T * N / W,
        "peft": merged
        + 6 * T * K / W
        + max(2 * T * K * r / slow, 4 * (T * K + r * K + T * r) / W)
        + max(2 * T * N * r / slow, 4 * (T * r + r * N + T * N) / W)
        + (8 + 10 + 6) * T * N / W,
        "merge": merged + max(2 * r * K * N / P, 2 * (2 * K * N + r * (K + N)) / W),
    }


@settings(max_examples=60, deadline=None)
@given(T=some.integers(1, 9000), K=some.integers(16, 9000), N=some.integers(16, 9000), r=some.integers(1, 256))
def test_kernels_add_up_to_the_formulas_on_paper(T, K, N, r):
    for traffic, seconds in roofline(T, K, N, r).items():
        adapter = "float32" if traffic == "peft" else ""
        assert high(traffic, T, K, N, r, adapter) == pytest.approx(seconds, rel=1e-12), traffic


# ---------------------------------------------------------------------------------------------- the hard floor

ODD = Module(T=5, K=300, N=700, r=12)
FREE = replace(H200, matmul={"bfloat16": 1e30, "float32": 1e30})
"""Products cost nothing: bytes alone."""


def test_hard_floor_counts_weights_and_factors_once_and_no_activation():
    assert hard([ODD], FREE, cold=True, adapted=True) * 4.3e12 == pytest.approx(2 * (300 * 700 + 12 * 1000))
    assert hard([ODD], FREE, cold=True, adapted=False) * 4.3e12 == pytest.approx(2 * 300 * 700)
    assert hard([replace(ODD, T=99)], FREE, cold=True, adapted=True) == hard([ODD], FREE, cold=True, adapted=True)


def test_hard_floor_of_a_hot_cell_has_no_bytes():
    flops = 2 * 5 * (300 * 700 + 12 * 1000)
    assert hard([ODD], H200, cold=False, adapted=True) == pytest.approx(flops / 790e12)
    assert hard([ODD], H200, cold=True, adapted=True) > 2 * hard([ODD], H200, cold=False, adapted=True)


def test_hard_floor_allows_an_implementation_that_merges_inside():
    """From T = K N / (K + N) on, forming s B A takes fewer FLOPs than two products with T rows."""
    long = replace(ODD, T=100_000)
    flops = 2 * 100_000 * 300 * 700 + 2 * 12 * 300 * 700
    assert hard([long], H200, cold=False, adapted=True) == pytest.approx(flops / 790e12)
    (fused,) = TRAFFIC["fused"](long)
    assert fused.flops > flops


def test_hard_floor_takes_the_larger_rate_of_memory():
    for read, copy in ((5e12, 3e12), (3e12, 5e12)):
        fast = replace(FREE, read=read, copy=copy)
        assert hard([ODD], fast, cold=True, adapted=False) == pytest.approx(2 * 300 * 700 / 5e12)


def test_hard_floor_of_wide_factors_beside_narrow_weights():
    wide = replace(ODD, adapter="float32")
    assert hard([wide], FREE, cold=True, adapted=True) * 4.3e12 == pytest.approx(2 * 300 * 700 + 4 * 12 * 1000)
    assert beyond([wide], FREE, cold=True) * 4.3e12 == pytest.approx(4 * 12 * 1000)
    assert beyond([wide], H200, cold=False) == pytest.approx(2 * 12 * 5 * 1000 / 790e12)


def test_n_adapters_read_n_times_the_factors_and_merged_copies_n_times_the_weights():
    cell = Cell(workload="mixed", shape="odd", batch=8, rank=12, adapters=4)
    modules = of(cell, [(700, 300)])
    assert hard(modules, FREE, cold=True, adapted=True) * 4.3e12 == pytest.approx(2 * (300 * 700 + 4 * 12 * 1000))
    assert sum(one.weights for one in kernels("merged", modules)) == 4 * 2 * 300 * 700
    assert sum(one.flops for one in kernels("merged", modules)) == 2 * 8 * 300 * 700
    assert hard(modules, FREE, cold=True, adapted=False) <= hard(modules, FREE, cold=True, adapted=True)
    (few,) = of(replace(cell, batch=3), [(700, 300)])
    assert few.n == 3


sizes = some.integers(1, 3000)


@settings(max_examples=60, deadline=None)
@given(T=sizes, K=sizes, N=sizes, r=some.integers(1, 256), grown=some.sampled_from("TKNr"), cold=some.booleans())
def test_hard_floor_grows_with_everything(T, K, N, r, grown, cold):
    small = Module(T=T, K=K, N=N, r=r)
    large = replace(small, **{grown: getattr(small, grown) * 2})
    for adapted in (True, False):
        assert hard([large], H200, cold=cold, adapted=adapted) >= hard([small], H200, cold=cold, adapted=adapted)


@settings(max_examples=60, deadline=None)
@given(T=sizes, K=sizes, N=sizes, r=some.integers(1, 256), cold=some.booleans(), read=some.floats(1e12, 9e12))
def test_more_passes_never_cost_less_and_nothing_is_below_the_hard_floor(T, K, N, r, cold, read):
    device = replace(H200, read=read)
    one = Module(T=T, K=K, N=N, r=r)
    parts = [kernels(name, [one]) for name in ("fused", "two", "eager")]
    parts.append(kernels("peft", [replace(one, adapter="float32")]))
    brackets = [expected(part, device, cold=cold) for part in parts]
    for less, more in pairwise(brackets):
        assert less[0] <= more[0] * (1 + 1e-12)
        assert less[1] <= more[1] * (1 + 1e-12)
    for traffic in set(TRAFFIC) - {"merged"}:
        low, most = expected(kernels(traffic, [one]), device, cold=cold)
        assert hard([one], device, cold=cold, adapted=True) <= low * (1 + 1e-12), traffic
        assert low <= most * (1 + 1e-12)
    assert hard([one], device, cold=cold, adapted=False) <= hard([one], device, cold=cold, adapted=True)


@pytest.mark.parametrize("traffic", ["looped", "gathered", "peft", "merge", "two", "dora"])
def test_n_adapters_cost_more_than_one_and_never_less_than_the_floor(traffic):
    one = Module(T=64, K=512, N=768, r=8, batch=16)
    several = replace(one, n=4)
    for cold in (True, False):
        low, _ = expected(kernels(traffic, [several]), H200, cold=cold)
        assert low * (1 + 1e-12) >= hard([several], H200, cold=cold, adapted=True)
    total = [sum(kernel.weights + kernel.passing for kernel in kernels(traffic, [m])) for m in (one, several)]
    assert total[1] > total[0]


def test_passes_of_a_mixed_batch_add_up():
    """PEFT with n adapters moves, for all together, T K and T N bytes as often as its lines of code say."""
    m = Module(T=12, K=30, N=70, r=4, n=3, batch=6, adapter="float32")
    moved = sum(one.passing for one in kernels("peft", [m])[1:])
    by_hand = 12 * 30 * (4 + 6 + 4) + 12 * 70 * (4 + 8 + 6 + 4 + 6 + 4) + 2 * 4 * 12 * 4
    assert moved == pytest.approx(by_hand)
    assert len(kernels("peft", [m])) == 1 + 3 * 9


def test_percent_of_peak_and_share_of_launches():
    found = peak([ODD], 1e-6, H200, cold=True, adapted=True)
    assert found.flops == pytest.approx(2 * 5 * (300 * 700 + 12 * 1000) / 1e-6 / 790e12)
    assert found.bytes == pytest.approx(2 * (300 * 700 + 12 * 1000) / 1e-6 / 4.3e12)
    assert found.larger == found.bytes
    assert peak([ODD], 1e-6, H200, cold=False, adapted=True).bytes is None
    assert launch_share(5.0, 2.0) == pytest.approx(0.6)


def test_what_was_not_counted_or_measured_is_said():
    with pytest.raises(InputError, match="'magic'"):
        kernels("magic", [ODD])
    with pytest.raises(InputError, match="float16"):
        hard([replace(ODD, base="float16")], H200, cold=True, adapted=True)
    with pytest.raises(InputError, match="int8"):
        hard([replace(ODD, base="int8")], H200, cold=True, adapted=True)


# ------------------------------------------------------------------------------------------------- ceilings

HERE = Place(device="cpu", cache=1 << 18)


def paced(timed, place):
    def once() -> float:
        began = time.thread_time()
        for call in timed.calls:
            call()
        return (time.thread_time() - began) / len(timed.calls)

    return once


@pytest.fixture(scope="module")
def found() -> Ceilings:
    clocks = (
        Clock(name="paced", about="", place=0, prepare=paced),
        Clock(name="absent", about="", place=1, prepare=paced, missing=lambda _: "no such clock here"),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return measuring.measured(HERE, ("float32", "bfloat16", "float32"), clocks, seconds=0.2)
    finally:
        torch.set_num_threads(threads)


def test_ceilings_of_this_place_are_those_of_a_processor(found):
    """Wide bars: slower than any core of this century is a mistake of units, faster than any too."""
    assert 1e9 < found.read < 1e12
    assert 1e9 < found.copy < 1e12
    assert set(found.matmul) == {"float32", "bfloat16"}
    assert 1e9 < found.matmul["float32"] < 1e12
    assert set(found.launch) == {"paced"}
    assert 2e-8 < found.launch["paced"] < 5e-5


def test_no_product_beats_the_ceiling_and_no_sum_reads_faster(found):
    """The cells are products and passes like these; a quarter is left for a core that changes its pace."""
    left, right = torch.randn(200, 500), torch.randn(500, 300)
    flops, best = 2 * 200 * 500 * 300, measuring.least(HERE, lambda: left @ right, 0.05)
    assert flops / best < 1.25 * found.matmul["float32"]
    buffer = torch.randn(64, 5 << 12)
    assert buffer.numel() * 4 / measuring.least(HERE, buffer.sum, 0.05) < 1.25 * found.read


def test_a_copy_counts_what_is_read_and_what_is_written():
    """A copy that does no work would be infinitely fast, one of half the bytes twice as fast: by hand it is neither."""
    buffer = torch.zeros(4, measuring.COLUMNS)
    buffer[:2] = 1.0
    (copy,) = measuring.copies(buffer)
    assert not torch.equal(buffer[:2], buffer[2:])
    copy()
    assert torch.equal(buffer, torch.zeros_like(buffer))


def test_reading_goes_over_every_element():
    buffer = torch.randn(3, measuring.COLUMNS, dtype=torch.float64)
    add, product = measuring.reads(buffer)
    assert add().item() == pytest.approx(buffer.sum().item())
    torch.testing.assert_close(product(), buffer @ buffer[0])


def test_the_best_sample_counts_and_none_is_left_out():
    samples = iter([5.0, 3.0, 4.0, 9.0, 7.0])
    assert min(measuring.sampled(lambda: next(samples), 0.0)) == 3.0
    with pytest.raises(StopIteration):
        next(samples)


def test_launch_is_one_operation_of_a_call_and_the_least_sample():
    called = []

    def counting(timed, place):
        def once() -> float:
            called.extend(call() for call in timed.calls)
            return measuring.TINY * (2e-6 if len(called) > measuring.CALLS else 5e-6)

        return once

    clock = Clock(name="counting", about="", place=0, prepare=counting)
    assert measuring.launch(HERE, clock, 0.0) == pytest.approx(2e-6)
    assert len(called) == measuring.SAMPLES * measuring.CALLS
    assert abs(called[0].item()) == 1.0
