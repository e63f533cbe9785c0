"""The benchmark of the checker: what it measures is so, what it judges is as right or broken as it says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.checker import __main__ as command
from benchmarks.checker import results as stored
from benchmarks.checker.arms import load
from benchmarks.checker.measure import measured
from benchmarks.checker.merging import LEFT_OUT, TOO_LARGE, write
from benchmarks.checker.models import make
from benchmarks.checker.nouns import Case, Run, Settings, Shape
from benchmarks.checker.page import page, useful
from benchmarks.checker.rotation import answer, rotated

MIB = 1 << 20
SETTINGS = Settings(seconds=60, memory=4 << 30)
SHAPE = Shape(
    name="micro",
    about="a Llama of three layers",
    hidden=48,
    layers=3,
    mlp=112,
    heads=4,
    kv_heads=2,
    vocabulary=160,
    shards=2,
    rank=6,
    alpha=10,
)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("micro")
    make(SHAPE, folder)
    for rule in ("rounded", "skipped", "scaled"):
        write(rule, folder / "base", folder / "adapter", folder / rule, folder / "merged")
    return Case(folder=folder, merged=folder / "merged")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


def differing(one: Path, other: Path) -> set[str]:
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def run_python(code: str, settings: Settings = SETTINGS) -> Run:
    return measured([sys.executable, "-c", code], settings)


# ------------------------------------------------------------------------------------------------------ measuring


def test_private_memory_is_what_belongs_to_no_file(tmp_path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(bytes(96 * MIB))
    touch = "import mmap, time; held = {}; sum(held[::4096]); time.sleep(0.2)"
    mapped = f"(lambda opened: mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ))(open({str(file)!r}, 'rb'))"
    idle, mapping, holding = (run_python(touch.format(held)) for held in ("b'0'", mapped, f"b'1' * {96 * MIB}"))
    assert [run.failed for run in (idle, mapping, holding)] == [""] * 3
    assert mapping.private - idle.private < 8 * MIB
    assert 96 * MIB <= holding.private - idle.private < 104 * MIB


def test_a_child_counts_for_the_process_that_started_it() -> None:
    burn = (
        "import time; held = b'1' * (64 << 20); end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    run = run_python(code)
    assert not run.failed
    assert run.cpu >= 0.4
    assert run.wall >= 0.4
    assert run.private >= 64 * MIB


@pytest.mark.parametrize(
    ("code", "limits", "words"),
    [
        ("import time; time.sleep(30)", {"seconds": 0.3}, "over the limit of 0.3 seconds"),
        ("import time; held = b'1' * (64 << 20); time.sleep(30)", {"memory": 48 * MIB}, "of private memory"),
        ("raise SystemExit(5)", {}, "exit code 5"),
        (
            "raise ValueError('so it goes')",
            {},
            'exit code 1:   File "<string>", line 1, in <module>; ValueError: so it goes',
        ),
    ],
)
def test_a_run_that_is_no_result_says_why(code, limits, words) -> None:
    assert words in run_python(code, replace(SETTINGS, **limits)).failed


def test_an_arm_that_fails_is_a_row_with_the_reason(case) -> None:
    broken = replace(load()["script"], command=lambda *_: [sys.executable, "-c", "import sys; sys.exit('no luck')"])
    silent = replace(load()["script"], name="silent", command=lambda *_: [sys.executable, "-c", "pass"])
    rows = rotated(case, [broken, silent], SETTINGS, repeats=2, cold=False, tell=lambda _: None)
    assert [(row["arm"], row["runs"]) for row in rows] == [("script", []), ("silent", [])]
    assert rows[0]["reason"] == "exit code 1: no luck"
    assert "cannot be read" in rows[1]["reason"]


# ---------------------------------------------------------------------------------------------------- the merges


def test_each_way_to_merge_changes_what_it_says(case) -> None:
    targets = {name for name in tensors(case.base) if "_proj" in name}
    assert differing(case.base, case.merged) == targets
    assert len(targets) == 7 * SHAPE.layers
    assert differing(case.merged, case.folder / "rounded") <= targets
    assert differing(case.merged, case.folder / "rounded")
    left_out = {name for name in targets if name.startswith(LEFT_OUT)}
    assert differing(case.merged, case.folder / "skipped") == left_out
    assert not differing(case.base, case.folder / "skipped") & left_out
    assert differing(case.merged, case.folder / "scaled") == {TOO_LARGE}


def said(name: str, case: Case, merged: str) -> str:
    arm = load()[name]
    found = replace(case, merged=case.folder / merged)
    words, reason = answer(arm, measured(arm.command(found, SETTINGS), SETTINGS, arm.codes))
    return reason or words.answer


@pytest.mark.parametrize(
    ("name", "merged", "answers"),
    [
        ("ours", "rounded", "right"),
        ("ours", "scaled", "wrong"),
        ("script", "merged", "right"),
        ("script", "skipped", "wrong"),
        ("cmp", "base", "right"),
        ("cmp", "scaled", "wrong"),
    ],
)
def test_the_arms_judge(case, name, merged, answers) -> None:
    assert said(name, case, merged) == answers


def test_a_judge_is_of_use_when_it_accepts_what_is_right_and_catches_what_is_not() -> None:
    good = {name: {"answer": "right"} for name in ("right", "rounded")}
    caught = {name: {"answer": "wrong"} for name in ("skipped", "scaled")}
    assert useful(good | caught) == "yes"
    assert useful(good | caught | {"rounded": {"answer": "none"}}) == "no: accepts 1 of 2 right, catches 2 of 2 broken"
    assert useful(good | caught | {"scaled": {"answer": "right"}}) == "no: accepts 2 of 2 right, catches 1 of 2 broken"


# ------------------------------------------------------------------------------------------- the command, the page


def test_one_command_measures_stores_and_renders(tmp_path) -> None:
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert command.main(["--sizes", "tiny", "--arms", "cmp,cat", "--parts", "arms", "--repeats", "2", *places]) == 0
    results = stored.load(tmp_path / "latest.json")
    rows = {row["arm"]: row for row in results["sizes"][0]["hot"]}
    assert {name: len(row["runs"]) for name, row in rows.items()} == {"cmp": 2, "cat": 2}
    assert not list((tmp_path / "work").iterdir())
    text = (tmp_path / "docs" / "speed.md").read_text()
    assert "| cmp " in text
    assert "75 tensors, 56 targets, 2 files" in text
    assert str(tmp_path) not in json.dumps(results)
    drawn = (tmp_path / "docs" / "speed.svg").read_bytes()
    assert command.main(["--render", *places]) == 0
    assert (tmp_path / "docs" / "speed.md").read_text() == text
    assert (tmp_path / "docs" / "speed.svg").read_bytes() == drawn


def test_results_of_two_machines_are_never_mixed(tmp_path) -> None:
    file, here = tmp_path / "latest.json", {"cpu": "this one", "units": [], "cores": 2, "memory": 1, "kernel": "k"}
    results = stored.begin(file, here)
    stored.put(results, {"name": "2gb", "merged_bytes": 2})
    stored.put(results, {"name": "1gb", "merged_bytes": 1})
    stored.put(results, {"name": "2gb", "merged_bytes": 3})
    stored.save(results, file)
    assert [one["merged_bytes"] for one in stored.begin(file, here)["sizes"]] == [1, 3]
    assert stored.begin(file, here | {"cores": 4})["sizes"] == []


def test_a_page_of_nothing_claims_nothing() -> None:
    machine = {"cpu": "c", "units": [], "cores": 2, "memory": 1, "kernel": "k", "versions": {}}
    empty = {"machine": machine, "sizes": [], "controls": None, "profile": None}
    assert "##" not in page(empty, "latest", None)
    broken = {"size": "2gb", "reason": "exit code 2", "stages": [], "rooms": [], "run": {}}
    assert "Not known: exit code 2." in page(empty | {"profile": broken}, "latest", None)
