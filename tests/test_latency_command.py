"""`lora_check bench`: what is measured, kept, printed, compared and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.latency import cli, plugins, results, run, suite
from benchmarks.latency.nouns import Cell, Place
from lora_check.__main__ import main
from lora_check.commands import bench

ROOT = Path(__file__).parents[1]
plugins_of = plugins.load
QUICK = ["--device", "cpu", "--suite", "tiny", "--rounds", "6", "--seconds", "60"]
PLACE = Place(device="cpu", cache=1 << 20)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two cells with one adapter and one with two, under a few backends."""
    file = tmp_path_factory.mktemp("bench") / "a.json"
    wanted = ["--workload", "linear,mixed", "--backend", "two_gemm,eager,looped,triton_fused"]
    assert main(["bench", *QUICK, *wanted, "--output", str(file)]) in (0, 1)
    return file


def test_every_cell_and_every_backend_is_in_the_results(measured: Path) -> None:
    found = results.load(measured)
    assert found.environment["finished"] is True
    assert "--suite tiny" in str(found.environment["command"])
    asked = suite.cells("tiny", workloads=("linear", "mixed"))
    assert [one.cell for one in found] == list(asked)
    for one in found:
        names = [row.backend for row in one.rows if not row.again]
        many = ["merged_copies", "looped"]
        assert names == (many if one.cell.adapters > 1 else ["merged", "two_gemm", "eager", "triton_fused"])
        timed = {row.backend for row in one.rows if row.clocks and row.clocks["device_busy"].samples}
        assert timed == set(names) - {"triton_fused"}
        assert sum(row.again for row in one.rows) == 1
        assert all(row.gate and row.gate.share <= 1 for row in one.rows if row.backend in timed)
    assert all("GPU" in row.missing for one in found for row in one.rows if row.backend == "triton_fused")


def test_the_page_has_the_table_and_the_answers(measured: Path) -> None:
    found = results.load(measured)
    text = cli.told(found)
    assert "two_gemm" in text
    assert "Decoding: linear tiny-llama/down" in text
    assert "needs a GPU" in text
    assert "Invalid: " in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert len(cli.told(found, every=True)) > len(text)
    assert "eager_wall, % over merged" in cli.told(found, clock="eager_wall")


def test_stored_results_are_shown_as_they_were_printed(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "show", str(measured)]) in (0, 1)
    assert capsys.readouterr().out == cli.told(results.load(measured))


def test_json_on_stdout_is_what_compare_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--workload", "linear", "--tokens", "2", "--backend", "two_gemm", "--format", "json"]
    assert main(["bench", *QUICK, *wanted]) in (0, 1)
    file = tmp_path / "b.json"
    file.write_text(capsys.readouterr().out)
    (one,) = results.load(file)
    assert (one.cell.tokens, one.cell.shape) == (2, "tiny-llama/down")


def test_a_run_beside_itself_is_the_same(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", str(measured), str(measured), "--format", "json"]) in (0, 3)
    told = json.loads(capsys.readouterr().out)
    assert told["counts"]["slower"] == told["counts"]["faster"] == 0
    assert told["counts"]["same"] > 0


def test_what_became_slower_is_told_by_the_exit_code(measured: Path, tmp_path: Path) -> None:
    raw = json.loads(measured.read_text())
    for cell in raw["cells"]:
        for row in cell["rows"]:
            for timing in row["clocks"].values():
                timing["samples"] = [100 * sample for sample in timing["samples"]]
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(raw))
    assert main(["bench", "compare", str(measured), str(slow), "--output", str(tmp_path / "told")]) == 1
    assert "slower" in (tmp_path / "told").read_text()
    assert main(["bench", "compare", str(slow), str(measured)]) in (0, 3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--suite", "huge"], "there is no suite 'huge'"),
        (["--backend", "magic"], "there is no backend 'magic'"),
        (["--device", "tpu"], "'tpu' is no device"),
        (["--workload", "audio"], "no cell of the suite"),
        (["--tokens", "0"], "'0' is no list of whole numbers above 0"),
        (["--output", "/nowhere/at/all.json"], "could not write /nowhere/at/all.json"),
        (["compare", "one.json"], "compare takes 2 files of results, not 1"),
        (["compare", "one.json", "two.json"], "one.json"),
        (["show"], "show takes 1 files of results, not 0"),
        (["page", "one.json"], "page takes no files"),
        (["run", "one.json"], "run takes no files"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_away_from_a_clone_it_says_where_it_lies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "HOME", "benchmarks.elsewhere.cli")
    assert main(["bench"]) == 2
    assert "in a clone of the repository" in capsys.readouterr().err


def test_a_library_that_is_not_there_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(name="transformers")

    monkeypatch.setattr(bench, "import_module", fail)
    assert main(["bench"]) == 2
    assert "bench needs transformers" in capsys.readouterr().err


def test_the_stored_page_is_the_one_that_is_made_of_the_stored_results(tmp_path: Path) -> None:
    from benchmarks.latency.page import build

    made = build(ROOT / "benchmarks" / "results", tmp_path)
    assert made.read_text() == (ROOT / "docs" / "latency.md").read_text(), "python -m lora_check bench page"


def test_cells_that_are_not_reached_are_told() -> None:
    cells = suite.asked("tiny", workloads=("linear",))
    found = run.run(cells, run.chosen(("eager",)), PLACE, seconds=1e-9, rounds=6, command=[])
    assert [one.cell for one in found] == list(cells)
    assert {row.missing for one in found for row in one.rows} == {"the seconds of this run were spent before it"}
    assert cli._code(found) == 2


def test_a_cell_without_a_time_is_not_all_measured(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results.load(measured)
    monkeypatch.setattr(cli.verdicts, "invalid", lambda run: 0)
    assert cli._code(found) == 0
    absent = replace(found.cells[0], rows=tuple(replace(row, clocks={}) for row in found.cells[0].rows))
    assert cli._code(replace(found, cells=(absent, *found.cells[1:]))) == 3


def test_a_subject_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    known = plugins.load("workloads")
    monkeypatch.setattr(
        run.plugins,
        "load",
        lambda folder: (
            {**known, "linear": replace(known["linear"], make=fail)} if folder == "workloads" else plugins_of(folder)
        ),
    )
    (cell, *_) = suite.cells("tiny", workloads=("linear",))
    found = run.run({cell: ()}, run.chosen(("eager",)), PLACE, seconds=30, rounds=6, command=[])
    assert {row.missing for one in found for row in one.rows} == {"it could not be made: RuntimeError"}


def test_a_module_that_is_too_large_for_a_backend_is_a_row_with_the_reason() -> None:
    dora = plugins.load("backends")["dora"]
    assert "too slow on a CPU at 4096 x 4096" in dora.unfit([(64, 64), (4096, 4096)], PLACE)
    assert not dora.unfit([(64, 64)], PLACE)
    assert not dora.unfit([(4096, 4096)], Place(device="cuda", cache=1))


def test_the_suites_name_shapes_that_exist_and_cells_only_once() -> None:
    workloads = plugins.load("workloads")
    for name in suite.SUITES:
        cells = suite.cells(name)
        assert len(set(cells)) == len(cells)
        assert all(workloads[cell.workload].modules(cell) for cell in cells)
    kinds = {cell.workload for cell in suite.cells("full")}
    assert kinds == set(workloads)


def test_given_values_take_the_place_of_those_of_the_suite() -> None:
    cells = suite.cells("full", workloads=("linear",), shapes=("small/q", "small"), tokens=(3, 65), ranks=(7,))
    assert {(cell.shape, cell.rank, cell.batch, cell.length) for cell in cells} == {
        ("small/q", 7, 3, 1),
        ("small/q", 7, 1, 65),
    }
    assert {cell.shape for cell in suite.cells("full", workloads=("model",), shapes=("small/q", "small"))} == {"small"}
    assert all(isinstance(cell, Cell) and cell.dtype == "float16" for cell in suite.cells("tiny", dtype="float16"))


def test_backends_that_a_suite_leaves_out_of_a_cell_are_not_asked_there() -> None:
    asked = suite.asked("full", workloads=("linear",), shapes=("llama-3-8b/q",))
    left_out = {without for cell, without in asked.items() if cell.rank == 16 and cell.cache == "cold"}
    assert left_out == {(), suite.COMPILED}, "the first grid that has a cell decides"
    assert asked[next(iter(asked))] == ()
    (cell, *_) = suite.cells("tiny", workloads=("linear",))
    found = run.run({cell: ("eager",)}, run.chosen(("eager", "two_gemm")), PLACE, seconds=1e-9, rounds=6, command=[])
    assert {row.backend for one in found for row in one.rows} == {"merged", "two_gemm"}
