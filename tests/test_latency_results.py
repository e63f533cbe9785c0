"""Results of the latency benchmark: stored whole or not at all, compared without guessing, told without leaving out."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.latency import compare, page, plot
from benchmarks.latency import environment as header
from benchmarks.latency.answers import sentences
from benchmarks.latency.figures import overhead, spread, summary
from benchmarks.latency.nouns import Ceilings, Cell, Gate, Measured, Place, Results, Row, Timing
from benchmarks.latency.results import Kept, as_dict, encoded, load, save, stored
from benchmarks.latency.table import (
    blocks,
    clock_of,
    column,
    detail,
    markdown,
    overview,
    percent,
    seconds,
    text,
    untimed,
    yardstick,
)
from benchmarks.latency.verdicts import Judgement, judged
from lora_check.errors import InputError, UsageError

CEILINGS = Ceilings(
    read=4.3e12,
    copy=4.0e12,
    matmul={"bfloat16": 790e12, "float32": 60e12},
    launch={"graph_replay": 1.2e-6, "eager_wall": 4e-6},
)
BACKENDS = {"merged": ("", 1.0, "merged"), "two_gemm": ("", 1.2, "two"), "peft_float32": ("float32", 2.0, "peft")}
GRAPH, WALL = "graph_replay", "eager_wall"
MISSING = "torch.compile finds no compiler here"
ENVIRONMENT = {
    "date": "2026-11-21 06:31 UTC",
    "command": "python -m lora_check bench",
    "commit": "0123abc",
    "seed": 3,
    "device": {"kind": "cuda", "name": "GPU one", "cache": 60 << 20, "memory": 150 << 30},
    "versions": {"torch": "2.11.0", "triton": None},
    "clocks": {"before": {"sm_mhz": 1980.0}, "after": {"sm_mhz": 1900.0}},
    "finished": True,
}


def timing(numbers: random.Random, base: float, many: int, noise: float) -> Timing:
    return Timing(samples=tuple(base * (1 + numbers.gauss(0, noise)) for _ in range(many)))


def measured(cell: Cell, numbers: random.Random, many: int, noise: float, slower: Mapping[str, float]) -> Measured:
    """Merged at twice its floor, the others at their factors, one backend missing and one wrong."""
    base = 2 * max(2 * cell.tokens * 4096**2 / 790e12, 2 * 4096**2 / 4.3e12)
    gate = Gate(share=0.25, bitwise=True, replayed="same")

    def row(name: str, *, again: bool = False) -> Row:
        adapter, factor, traffic = BACKENDS[name]
        time = base * factor * (1 if again else slower.get(name, 1))
        clocks = {GRAPH: timing(numbers, time, many, noise), WALL: timing(numbers, 1.5 * time, many, noise)}
        return Row(
            backend=name,
            about=name,
            adapter=adapter,
            traffic=traffic,
            merged=name == "merged",
            again=again,
            gate=gate,
            clocks=clocks,
            kernels=3,
        )

    broken = Row(backend="dora", about="", adapter="", gate=Gate(share=math.nan, wrong="NaN in the output of q_proj"))
    rows = [row("merged"), row("merged", again=True), row("two_gemm"), row("peft_float32")]
    missing = Row(backend="compiled", about="", adapter="", missing=MISSING)
    return Measured(cell=cell, modules=((4096, 4096),), rows=(*rows, missing, broken), merge=Timing(samples=(1e-5,)))


def made(
    seed: int = 0,
    *,
    many: int = 40,
    noise: float = 0.01,
    slower: Mapping[str, float] = MappingProxyType({}),
    environment: Mapping[str, object] = ENVIRONMENT,
    tokens: Sequence[int] = (1, 128, 2048),
    ranks: Sequence[int] = (8, 16),
) -> Results:
    numbers = random.Random(seed)
    linear = Cell(workload="linear", shape="llama-3-8b/q", targets=("q_proj",))
    cells = [replace(linear, rank=rank, length=many_) for rank in ranks for many_ in tokens]
    found = tuple(measured(cell, numbers, many, noise, slower) for cell in cells)
    return Results(environment=environment, ceilings=CEILINGS, cells=found)


def on(name: str, **others: object) -> dict[str, object]:
    return {**ENVIRONMENT, "device": {"kind": "cuda", "name": name}, **others}


# -------------------------------------------------------------------------------------------------------- storing

finite = st.floats(allow_nan=False, allow_infinity=False)
samples = st.lists(st.floats(min_value=1e-9, max_value=1e3), max_size=4).map(tuple)
names = st.text(max_size=8)
rows = st.builds(
    Row,
    backend=names,
    about=names,
    adapter=names,
    merged=st.booleans(),
    again=st.booleans(),
    missing=names,
    gate=st.none() | st.builds(Gate, share=st.floats(allow_nan=False), bitwise=st.booleans(), wrong=names),
    clocks=st.dictionaries(names, st.builds(Timing, samples=samples, missing=names), max_size=2),
    kernels=st.none() | st.integers(),
    memory=st.none() | st.integers(),
)
cells = st.builds(
    Cell,
    workload=names,
    shape=names,
    batch=st.integers(1, 9),
    targets=st.lists(names, max_size=3).map(tuple),
    cache=st.sampled_from(["cold", "hot"]),
)
several = st.builds(
    Results,
    environment=st.dictionaries(names, st.none() | finite | names | st.lists(st.integers(), max_size=2), max_size=3),
    ceilings=st.builds(
        Ceilings,
        read=finite,
        copy=finite,
        matmul=st.dictionaries(names, finite, max_size=2),
        launch=st.dictionaries(names, finite, max_size=2),
    ),
    cells=st.lists(
        st.builds(
            Measured,
            cell=cells,
            modules=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=2).map(tuple),
            rows=st.lists(rows, max_size=2).map(tuple),
            merge=st.builds(Timing, samples=samples),
        ),
        max_size=2,
    ).map(tuple),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@settings(max_examples=40)
@given(results=several)
def test_what_is_stored_comes_back_to_the_last_digit(results, folder) -> None:
    save(results, folder / "one.json")
    assert load(folder / "one.json") == results


def strict(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def test_a_share_that_is_no_number_is_stored_as_strict_json(tmp_path) -> None:
    results = made(tokens=(1,), ranks=(8,))
    save(results, tmp_path / "one.json")
    json.loads((tmp_path / "one.json").read_text(), parse_constant=strict)
    shares = [row.gate.share for row in load(tmp_path / "one.json").cells[0].rows if row.gate]
    assert [math.isnan(one) for one in shares] == [False] * 4 + [True]


def damaged(change) -> str:
    found = as_dict(made(tokens=(1,), ranks=(8,)))
    change(found)
    return json.dumps(found)


def row_of(found) -> dict:
    return found["cells"][0]["rows"][0]


DAMAGES = {
    "cut short": ('{"schema": 1, "benchm', "not strict JSON"),
    "not a number": (damaged(lambda found: row_of(found)["gate"].update(share=math.nan)), "NaN is no JSON"),
    "binary": ("\0\1", "not strict JSON"),
    "a list": ("[]", "holds no results of the latency benchmark"),
    "of another benchmark": (damaged(lambda found: found.update(benchmark="checker")), "holds no results"),
    "of another schema": (damaged(lambda found: found.update(schema=2)), "schema 2 of its results is not 1"),
    "no cells": (damaged(lambda found: found.pop("cells")), "cells is not there"),
    "a gate without its finding": (
        damaged(lambda found: row_of(found)["gate"].pop("wrong")),
        "gate.wrong is not there",
    ),
    "a word for a time": (
        damaged(lambda found: row_of(found)["clocks"][GRAPH]["samples"].append("soon")),
        "cells[0].rows[0].clocks.graph_replay.samples[40] is 'soon', no number",
    ),
    "yes for a number": (damaged(lambda found: found["ceilings"].update(read=True)), "ceilings.read is True"),
    "a strange cache": (damaged(lambda found: found["cells"][0]["cell"].update(cache="warm")), "none of cold, hot"),
    "half a shape": (damaged(lambda found: found["cells"][0].update(modules=[[1]])), "has 1 entries, not 2"),
    "a text for rows": (damaged(lambda found: found["cells"][0].update(rows="none")), "is a str, not a list"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_one_sentence_that_names_it(name, tmp_path) -> None:
    file = tmp_path / "one.json"
    content, said = DAMAGES[name]
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        load(file)
    assert said in caught.value.message
    assert caught.value.message.startswith(f"{file}: ")
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_an_undamaged_file_of_the_same_make_is_read(tmp_path) -> None:
    file = tmp_path / "one.json"
    file.write_text(damaged(lambda found: found.update(younger="unknown keys are passed over")))
    assert len(load(file).cells) == 1


def test_no_file_and_no_room_are_one_sentence_too(tmp_path) -> None:
    with pytest.raises(InputError, match="there is no such file of results"):
        load(tmp_path / "none.json")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write results to"):
        save(made(tokens=(1,), ranks=(8,)), tmp_path / "file" / "one.json")


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    file = tmp_path / "one.json"
    results = made(tokens=(1,), ranks=(8,))
    save(results, file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError, match="No space left on device"):
        save(made(seed=1), file)
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]
    assert file.read_bytes() == before


def test_a_run_cut_short_leaves_its_cells_and_says_so(tmp_path) -> None:
    results, file = made(), tmp_path / "run" / "one.json"
    kept = Kept(file, {"commit": "0123abc"}, results.ceilings)
    for number, one in enumerate(results.cells[:2], 1):
        kept.add(one)
        found = load(file)
        assert (encoded(found.cells), found.environment["finished"]) == (encoded(results.cells[:number]), False)
    kept.end({"commit": "0123abc", "clocks": None})
    assert load(file).environment == {"commit": "0123abc", "clocks": None, "finished": True}
    assert len(load(file).cells) == 2


def test_results_of_others_are_passed_over_and_broken_ones_are_not(tmp_path) -> None:
    save(made(tokens=(1,), ranks=(8,)), tmp_path / "gpu" / "one.json")
    (tmp_path / "checker").mkdir()
    (tmp_path / "checker" / "latest.json").write_text('{"schema": 1, "machine": {}}')
    assert list(stored(tmp_path)) == [tmp_path / "gpu" / "one.json"]
    (tmp_path / "gpu" / "two.json").write_text('{"schema": 1, "benchmark": "late')
    with pytest.raises(InputError, match=r"two\.json"):
        stored(tmp_path)


# ---------------------------------------------------------------------------------------------------- environment

HERE = Place(device="cpu", cache=2 << 20)
KEYS = {"date", "command", "commit", "seed", "device", "processor", "versions", "precision", "threads", "clocks"}


def test_the_header_says_on_what_and_names_nobody() -> None:
    import getpass
    import socket

    command = ["python", "-m", "lora_check", "bench", "--json=/home/someone/one.json", "/data/two.json", "rel/a.json"]
    begun = header.environment(HERE, seed=5, command=command)
    found = json.loads(json.dumps(header.ended(begun, HERE), allow_nan=False))
    assert found.keys() == KEYS
    assert found["command"] == "python -m lora_check bench --json=one.json two.json rel/a.json"
    assert found["device"]["cache"] == 2 << 20
    assert found["clocks"]["before"].keys() == found["clocks"]["after"].keys() == {"cpu_mhz"}
    told = json.dumps({**found, "command": ""})
    assert not re.search(r'"/|[A-Za-z]:\\\\|/(home|root|tmp|work|usr)/', told)
    assert socket.gethostname() not in told or len(socket.gethostname()) < 4
    assert getpass.getuser() not in told


@pytest.mark.parametrize(
    ("argument", "told"),
    [("/a/b c/d.json", "d.json"), ("--out=~/x.json", "--out=x.json"), ("C:\\u\\y.json", "y.json"), ("a/b", "a/b")],
)
def test_an_absolute_path_is_cut_to_its_name(argument, told) -> None:
    assert header.without_folders(argument) == told


def test_the_line_of_nvidia_smi_is_that_of_our_device() -> None:
    one, two = (["GPU-aa", "570.1", "1980", "2619", "31", "75.2"], ["GPU-bb", "570.1", "1200", "2619", "40", "[N/A]"])
    assert header.line_of([one, two], "bb")["clocks.sm"] == "1200"
    assert header.line_of([one], "")["driver_version"] == "570.1"
    assert header.line_of([one, two], "cc") == header.line_of([["GPU-bb", "No devices"]], "") == {}


def test_a_program_that_does_not_answer_leaves_the_clocks_unknown(tmp_path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpu = Place(device="cuda", cache=60 << 20)
    program.write_text("#!/bin/sh\necho 'GPU-aa, 570.1, 1980, 2619, 31, [N/A]'\n")
    program.chmod(0o755)
    assert header.clocks(gpu) == {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "celsius": 31.0, "watt": None}
    program.write_text("#!/bin/sh\necho no devices were found; exit 6\n")
    assert header.clocks(gpu) == dict.fromkeys(("sm_mhz", "memory_mhz", "celsius", "watt"))


# ----------------------------------------------------------------------------------------------------- statistics


def test_the_figures_are_those_of_numpy() -> None:
    one = made().cells[1]
    merged, again, two = one.rows[:3]
    base, other = (np.array(row.clocks[GRAPH].samples) for row in (merged, two))
    assert summary(two.clocks[GRAPH]).p80 == np.percentile(other, 80)
    assert overhead(two, merged, GRAPH).median == pytest.approx(np.median(other / base - 1), rel=1e-12)
    apart = np.abs(np.array(again.clocks[GRAPH].samples) / base - 1)
    assert np.mean(apart <= spread(one, GRAPH)) == pytest.approx(0.6, abs=1 / 40)


def test_rounds_that_do_not_pair_have_no_overhead() -> None:
    one = made(tokens=(1,), ranks=(8,)).cells[0]
    short = replace(one.rows[2], clocks={GRAPH: Timing(samples=(1.0,))})
    assert overhead(short, one.rows[0], GRAPH) is None
    assert overhead(one.rows[2], one.rows[0], GRAPH) is not None
    assert overhead(one.rows[2], None, GRAPH) is None


# ------------------------------------------------------------------------------------------------------ comparing


def words(a: Results, b: Results, backend: str = "two_gemm", clock: str = GRAPH) -> set[str]:
    return {pair.word for pair in compare.compared(a, b).pairs if (pair.backend, pair.clock) == (backend, clock)}


SHORT = {"tokens": (1, 2048), "ranks": (16,)}


@pytest.mark.parametrize(("factor", "word"), [(1.1, "slower"), (1 / 1.1, "faster"), (1.0, "same")])
def test_a_known_shift_gets_its_word(factor, word) -> None:
    a, b = made(1, many=100, **SHORT), made(2, many=100, slower={"two_gemm": factor}, **SHORT)
    found = compare.compared(a, b)
    shifted = [pair for pair in found.pairs if pair.backend == "two_gemm"]
    assert {pair.word for pair in shifted} == {word}
    assert [pair.seconds.ratio for pair in shifted] == pytest.approx([factor] * 4, rel=0.01)
    assert [pair.overhead.ratio for pair in shifted] == pytest.approx([factor] * 4, rel=0.01)
    assert words(a, b, "peft_float32") == words(a, b, "merged") == {"same"}
    assert (found.slower, found.count("faster")) == (4 * (word == "slower"), 4 * (word == "faster"))
    assert (found.comparable, found.lost) == (True, 0)


def test_an_interval_holds_its_ratio_as_often_as_it_says() -> None:
    from scipy.stats import binom

    numbers, many = np.random.default_rng(3), 200
    pairs = [(numbers.lognormal(0, 0.1, 25), 1.05 * numbers.lognormal(0, 0.1, 31)) for _ in range(many)]
    found = [compare.interval(*pair) for pair in pairs]
    assert sum(low <= 1.05 <= high for low, high in found) >= binom.ppf(1e-4, many, compare.LEVEL)
    assert sum(low <= 1.25 <= high for low, high in found) < binom.ppf(1e-4, many, compare.LEVEL)


def test_a_slower_yardstick_shows_in_seconds_and_in_the_overhead_of_others() -> None:
    a, b = made(1, many=100, **SHORT), made(2, many=100, slower={"merged": 1.2}, **SHORT)
    pairs = {(one.backend, one.clock): one for one in compare.compared(a, b).pairs}
    assert pairs["two_gemm", GRAPH].seconds.word == "same"
    assert pairs["two_gemm", GRAPH].overhead.ratio == pytest.approx(1 / 1.2, rel=0.02)
    assert pairs["two_gemm", GRAPH].overhead.word != "same"
    assert pairs["merged", GRAPH].overhead is None


def reasons(a: Results, b: Results) -> str:
    pairs = [pair for pair in compare.compared(a, b).pairs if pair.backend == "two_gemm"]
    assert {pair.word for pair in pairs} == {"ambiguous"}
    return "\n".join(pair.reason for pair in pairs)


def test_what_cannot_be_told_is_ambiguous_and_says_why() -> None:
    a = made(1, **SHORT)
    assert "the interval straddles the A/A" in reasons(a, made(2, noise=0.3, slower={"two_gemm": 1.3}, **SHORT))
    assert "the A/A is wider than the change" in reasons(a, made(6, many=400, noise=0.2, **SHORT))
    few = reasons(a, made(2, many=5, slower={"two_gemm": 1.5}, **SHORT))
    assert few.splitlines()[0] == "too few samples: 40 and 5, an interval at 95% needs 6"
    alone = [replace(one, rows=tuple(row for row in one.rows if not row.again)) for one in a]
    assert "no A/A in one of the runs" in reasons(a, replace(a, cells=tuple(alone)))


def test_six_samples_are_the_fewest_that_bound_a_median() -> None:
    assert 1 - 2 * 0.5**compare.FEWEST >= compare.LEVEL > 1 - 2 * 0.5 ** (compare.FEWEST - 1)


def test_other_devices_are_not_compared_but_their_overheads_are() -> None:
    a = made(1, **SHORT)
    b = made(2, environment=on("GPU two"), slower=dict.fromkeys(BACKENDS, 3.0), **SHORT)
    found = compare.compared(a, b)
    assert not found.comparable
    assert {pair.word for pair in found.pairs} == {"not comparable"}
    assert compare.page(found).startswith("not comparable: different devices: GPU one, and GPU two;")
    ratios = [pair.overhead.ratio for pair in found.pairs if pair.overhead]
    assert ratios == pytest.approx([1.0] * 8, rel=0.02)
    nameless = {**ENVIRONMENT, "device": {"kind": "cuda"}}
    assert not compare.compared(
        made(1, environment=nameless, **SHORT), made(1, environment=nameless, **SHORT)
    ).comparable


def test_differences_are_told_up_front() -> None:
    changed = {**ENVIRONMENT, "versions": {"torch": "2.12.0", "triton": None}, "finished": False}
    found = compare.compared(made(1, **SHORT), made(1, environment=changed, **SHORT))
    assert found.differs == ("B was cut short", "versions.torch: 2.11.0, then 2.12.0")
    assert found.comparable
    assert "differs: versions.torch" in compare.page(found)
    assert compare.compared(made(1, **SHORT), made(1, **SHORT)).differs == ()


def without_backend(results: Results, name: str, missing: str) -> Results:
    def changed(row: Row) -> Row:
        return Row(backend=name, about="", adapter=row.adapter, missing=missing) if row.backend == name else row

    return replace(results, cells=tuple(replace(one, rows=tuple(map(changed, one.rows))) for one in results))


def test_what_was_timed_and_is_no_more_is_lost_with_the_reason() -> None:
    a = made(1, **SHORT)
    gone, fewer = without_backend(a, "two_gemm", "it raised: no kernel"), replace(a, cells=a.cells[:1])
    found = compare.compared(a, gone)
    assert {(one.word, one.reason) for one in found.pairs if one.backend == "two_gemm"} == {
        ("lost", "in B: it raised: no kernel")
    }
    assert found.lost == 4
    assert "lost [" in compare.page(found)
    assert compare.compared(gone, a).count("new") == 4
    assert compare.compared(a, fewer).lost == 2 * len(BACKENDS)


def test_a_comparison_is_told_on_a_screen_and_in_json() -> None:
    a, b = made(1, **SHORT), made(2, slower={"two_gemm": 1.1}, **SHORT)
    found = compare.compared(a, b)
    told = compare.page(found)
    assert max(map(len, told.splitlines())) <= 120
    assert told.count("two_gemm") == 4
    assert "peft_float32" not in told
    assert "peft_float32" in compare.page(found, everything=True)
    assert f"{len(found.pairs)} times compared: 4 slower" in told.replace("\n    ", " ")
    again = json.loads(json.dumps(compare.as_dict(found), allow_nan=False))
    assert again["counts"]["slower"] == found.slower == 4
    assert len(again["pairs"]) == len(found.pairs) == 12
    mean = np.exp(np.mean([math.log(one.seconds.ratio) for one in found.pairs if one.clock == GRAPH]))
    assert again["ratios"][GRAPH] == pytest.approx(mean, rel=1e-12)


# --------------------------------------------------------------------------------------------------------- tables


def judge(one: Measured) -> Mapping[tuple[str, bool, str], Judgement]:
    return judged(one, CEILINGS)


def test_the_main_table_has_every_backend_and_every_reason() -> None:
    results = made()
    tables = overview(results, GRAPH, judge)
    assert [len(one.heads) for one in tables] == [4, 4]
    first = tables[0]
    assert [row[0] for row in first.rows] == [
        "merged",
        "merged again (A/A)",
        "two_gemm",
        "peft_float32",
        "compiled",
        "dora",
    ]
    cell = results.cells[0]
    over = overhead(cell.rows[2], yardstick(cell), GRAPH)
    assert first.rows[2][1] == f"{percent(over.median)} ±{100 * spread(cell, GRAPH):.1f}"
    assert first.rows[0][1] == seconds(summary(cell.rows[0].clocks[GRAPH]).median)
    assert [row[1] for row in first.rows[4:]] == ["[1]", "[2]"]
    assert first.notes == (f"[1] {MISSING}", "[2] wrong: NaN in the output of q_proj")


def test_invalid_and_noisy_entries_are_marked() -> None:
    fast = made(slower={"two_gemm": 0.1, "peft_float32": 0.5}, **SHORT)
    rows = overview(fast, GRAPH, judge)[0].rows
    assert re.fullmatch(r"-\d\d\.\d ±\d\.\d!\[1\]", rows[2][1])
    assert rows[3][1].endswith("~")
    assert "!" not in str(overview(made(**SHORT), GRAPH, judge))


def test_a_clock_without_samples_is_told_in_a_note() -> None:
    one = made(tokens=(1,), ranks=(8,)).cells[0]
    merged = replace(one.rows[0], clocks={GRAPH: Timing(missing="no graphs on a CPU"), WALL: one.rows[0].clocks[WALL]})
    changed = replace(one, rows=(merged, *one.rows[1:]))
    assert untimed(merged, GRAPH) == "no graphs on a CPU"
    assert "no graphs on a CPU" in text(detail(changed, {})[0])
    assert "merged has no time to be compared with" in text(overview([changed], GRAPH)[0])
    late = replace(
        one, cell=replace(one.cell, length=9), rows=(Row(backend="merged", about="", adapter="", missing="late"),)
    )
    notes = overview([one, late], GRAPH)[0].notes
    assert {"late", "merged was not timed here", "not asked for in this cell"} <= {note[4:] for note in notes}
    unchecked = replace(one.rows[2], gate=None)
    assert untimed(unchecked, GRAPH) == "two_gemm: its output was never checked"
    assert untimed(one.rows[2], GRAPH) == ""
    assert clock_of([changed]) == GRAPH
    assert clock_of([replace(one, rows=(merged,))]) == WALL


def test_the_detail_of_a_cell_holds_floor_and_verdict() -> None:
    one = made().cells[2]
    times, verdicts = detail(one, judge(one))
    found = summary(one.rows[2].clocks[GRAPH])
    low, middle, high = (seconds(value, ("us", 1e6)) for value in (found.p20, found.median, found.p80))
    assert f"{middle} ({low}-{high})" in times.rows[2]
    assert times.rows[2][-4:] == ("40", "3", "0.25", "yes")
    said = judge(one)["two_gemm", False, GRAPH]
    row = next(row for row in verdicts.rows if row[0] == "two_gemm")
    assert row[5:7] == (seconds(said.floor), percent(found.median / said.floor - 1))
    assert row[-1].startswith(said.word)
    assert any(note.endswith(said.reason) for note in verdicts.notes)
    assert {row[-1] for row in detail(one, {})[1].rows} == {"not judged"}
    assert max(len(line) for table in (times, verdicts) for line in text(table).splitlines()) <= 120


def test_tokens_are_named_so_that_no_two_columns_look_alike() -> None:
    shapes = [(1, 1), (8, 1), (1, 8), (4, 512)]
    heads = [column(Cell(workload="", shape="", batch=batch, length=length)) for batch, length in shapes]
    assert heads == ["1", "8x1", "8", "4x512"]
    many = made(tokens=tuple(range(1, 11)), ranks=(16,), many=2)
    assert [len(one) for one in blocks(many)] == [7, 3]


@pytest.mark.parametrize(
    ("value", "told"), [(7.81e-6, "7.81 us"), (3.49e-3, "3.49 ms"), (0.99, "990 ms"), (4.6, "4.60 s")]
)
def test_seconds_have_the_unit_that_fits(value, told) -> None:
    assert seconds(value) == told


# ---------------------------------------------------------------------------------------------------------- plots


def test_plots_are_the_same_for_the_same_figures_and_others_for_others(tmp_path) -> None:
    one, two, other = (
        plot.draw(made(seed, many=5), GRAPH, tmp_path / folder, "gpu")
        for seed, folder in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert set(one) == {"tokens", "rank", "roofline"}
    assert all(one[kind].read_bytes() == two[kind].read_bytes() for kind in one)
    assert all(one[kind].read_bytes() != other[kind].read_bytes() for kind in one)
    for file in one.values():
        words = [node.text for node in ElementTree.parse(file).iter() if node.text and node.text.strip()]
        assert {"two_gemm", "peft_float32"} <= set(words)
        assert not re.search(r"\d{4}-\d\d-\d\d|file:/|/(home|root|tmp|work|usr)/", file.read_text())


def test_no_panel_cuts_off_what_another_has_not() -> None:
    results = made(many=3, tokens=(1, 2048), slower={"two_gemm": 0.7})
    steep = made(many=3, tokens=(1, 2048), ranks=(4,), slower={"peft_float32": 9})
    figure = plot.over_tokens(replace(results, cells=(*steep.cells, *results.cells)), GRAPH)
    assert len(figure.axes) == 3
    least, most = min(one.dataLim.y0 for one in figure.axes), max(one.dataLim.y1 for one in figure.axes)
    assert least < 0 < 1500 < most
    assert all(one.get_ylim()[0] <= least and most < one.get_ylim()[1] for one in figure.axes)


def test_the_roofline_holds_flops_and_bytes_as_they_are_counted() -> None:
    one = made(tokens=(2048,), ranks=(16,)).cells[0]
    intensity, rate = plot.achieved(one, "merged", GRAPH, CEILINGS)
    assert intensity == pytest.approx(2048, rel=1e-12)
    assert rate == pytest.approx(2 * 2048 * 4096**2 / np.median(one.rows[0].clocks[GRAPH].samples), rel=1e-12)
    assert plot.achieved(one, "compiled", GRAPH, CEILINGS) is None


def test_without_points_there_is_no_plot(tmp_path) -> None:
    assert plot.draw(replace(made(), cells=()), GRAPH, tmp_path, "gpu") == {}
    assert list(tmp_path.iterdir()) == []


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("colour", [*plot.COLOURS, plot.INK])
@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_every_colour_stands_out_on_a_light_and_on_a_dark_page(colour, ground) -> None:
    dark, light = sorted((luminance(colour), luminance(ground)))
    assert (light + 0.05) / (dark + 0.05) >= 3


# ----------------------------------------------------------------------------------------------------------- page


def test_the_page_holds_exactly_what_the_functions_print(tmp_path) -> None:
    results = made(many=9, ranks=(16,))
    save(results, tmp_path / "results" / "gpu" / "one.json")
    written = page.build(tmp_path / "results", tmp_path / "docs")
    told = written.read_text()
    found = load(tmp_path / "results" / "gpu" / "one.json")
    for one in (*overview(found, GRAPH, judge), *overview(found, WALL, judge)):
        assert markdown(one) in told
    flat = " ".join(told.split())
    assert all(f"- {' '.join(one.split())}" in flat for one in sentences(found))
    assert "invalid: 0 of 24 times" in flat
    assert "- versions: torch 2.11.0, triton none" in told
    linked = re.findall(r"\]\((.+?)\)", told)
    assert linked
    assert all((tmp_path / "docs" / one).exists() for one in linked)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr)/", told)
    assert str(tmp_path) not in told
    again = page.build(tmp_path / "results", tmp_path / "other")
    assert again.read_bytes() == written.read_bytes()


def test_a_chapter_for_each_device_and_the_newest_results_of_it() -> None:
    cpu = {**ENVIRONMENT, "device": {"kind": "cpu", "name": "Processor"}}
    old = made(many=3, environment={**ENVIRONMENT, "date": "2025-01-01"}, **SHORT)
    found = {
        Path("a/cpu.json"): made(many=3, environment=cpu, **SHORT),
        Path("b/old.json"): old,
        Path("b/new.json"): made(many=3, **SHORT),
    }
    told = page.page(found, {})
    assert re.findall(r"^## (.+)$", told, re.MULTILINE) == ["How it is measured", "GPU one", "Processor"]
    assert "results: b/new.json" in told
    assert "not shown: b/old.json" in told
    assert "No GPU was at hand" not in told
    assert told.count(page.CONTROL) == 1
    alone = page.page({Path("a/cpu.json"): found[Path("a/cpu.json")]}, {})
    assert page.NO_GPU.splitlines()[0] in alone


def test_without_results_there_is_no_page(tmp_path) -> None:
    with pytest.raises(InputError, match="no results of the latency benchmark"):
        page.build(tmp_path, tmp_path / "docs")
    assert list(tmp_path.iterdir()) == []


def test_a_run_cut_short_is_called_so_on_the_page() -> None:
    cut = {**ENVIRONMENT, "finished": False}
    assert "**cut short**" in page.page({Path("a/b.json"): made(many=3, environment=cut, **SHORT)}, {})
    assert "cut short" not in page.page({Path("a/b.json"): made(many=3, **SHORT)}, {})


def test_a_prediction_is_its_kernels_beyond_merged_with_their_launches() -> None:
    one = made(tokens=(1,), ranks=(16,)).cells[0]
    two = one.rows[2]
    factors = 16 * (4096 + 4096) * 2
    low, high = page.added(one, two, GRAPH, CEILINGS)
    assert low == pytest.approx(2 * 1.2e-6 + factors / 4.3e12, rel=1e-12)
    assert high == pytest.approx(2 * 1.2e-6 + (factors + 2 * (4096 + 16 + 16 + 2 * 4096)) / 4.0e12, rel=1e-9)
    free = replace(CEILINGS, launch={})
    assert page.added(one, two, GRAPH, free)[0] == pytest.approx(factors / 4.3e12, rel=1e-9)


def test_where_our_kernel_or_merging_does_not_win_is_listed() -> None:
    def renamed(row: Row) -> Row:
        return replace(row, backend=page.OURS) if row.backend == "peft_float32" else row

    results = made(slower={"two_gemm": 1 / 1.2}, **SHORT)
    ours = replace(results, cells=tuple(replace(one, rows=tuple(map(renamed, one.rows))) for one in results))
    told = "\n".join(page.losses(ours, GRAPH))
    assert told.count("- two_gemm") == 4
    assert f"{page.OURS} +" in told
    assert f"`{page.OURS}`, the kernel of this benchmark: not measured" in "\n".join(page.losses(results, GRAPH))
    assert "nowhere" in page.losses(made(**SHORT), GRAPH)[0]
