"""Checks in parts: gone on with where they stopped, divided among machines; nothing is taken for done that is not."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from test_corpus import CORPUS, made

from benchmarks import scale
from lora_check import fingerprint, items, pipeline, work
from lora_check.__main__ import main
from lora_check.errors import InputError, LoraCheckError, UsageError
from lora_check.first_pass import Part
from lora_check.journal import Head, Journal, request_of
from lora_check.types import Comparison, Verdict

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
LAYERS = 12
PIECES = 3 * LAYERS


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[str]]:
    """Whether it is broken -> the locations of a merge that nobody changes."""
    root = tmp_path_factory.mktemp("kept")
    return {broken: many.make(root / str(broken), LAYERS, broken=broken) for broken in (False, True)}


@pytest.fixture
def places(kept: dict[bool, list[str]], tmp_path: Path) -> list[str]:
    """A sound merge that may be changed."""
    return [str(shutil.copytree(place, tmp_path / Path(place).name)) for place in kept[False]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the comparisons that are really made."""
    keys, perform = [], work.Job.perform

    def counted(self: work.Job, item: items.Item) -> Any:
        if item.measure is None:
            keys.append(item.key)
        return perform(self, item)

    monkeypatch.setattr(work.Job, "perform", counted)
    return keys


def check(places: list[str], **options: Any) -> Any:
    base, adapter, merged = places
    return many.plain(pipeline.check(base, adapter, merged, jobs=1, **options).as_dict())


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


# ------------------------------------------------------------------------------------------------------ gone on with


def test_a_finished_journal_gives_the_report_again_and_nothing_is_compared(kept, tmp_path, asked):
    for broken, locations in kept.items():
        file = tmp_path / f"{broken}.journal"
        first = check(locations, journal=str(file))
        assert first == check(locations)
        assert len(lines(file)) == 1 + PIECES
        before = file.read_bytes()
        asked.clear()
        assert check(locations, journal=str(file)) == first
        assert asked == []
        assert file.read_bytes() == before
        assert (first["verdict"] == "refuted") is broken


@pytest.mark.parametrize("broken", [False, True])
def test_a_check_that_is_killed_goes_on_where_it_was(broken, tmp_path, asked):
    locations = many.make(tmp_path / "long", 60, broken=broken)
    file, pieces = tmp_path / "journal", 3 * 60
    argv = [sys.executable, "-m", "lora_check", "report", *locations, "--jobs", "1", "--journal", str(file)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    while not file.exists() or file.read_bytes().count(b"\n") < 20:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = [json.loads(line)["item"] for line in lines(file)[1:] if line.endswith(b"\n")]
    assert 20 <= 1 + len(finished) < pieces
    report = check(locations, journal=str(file))
    assert not set(asked) & set(finished)
    assert len(asked) + len(finished) == pieces
    asked.clear()
    assert report == check(locations)
    assert len(asked) == pieces


@pytest.mark.parametrize("where", [0, 1, 400, 5_000, -1, -2, -100])
def test_a_journal_that_was_cut_anywhere_is_gone_on_with(kept, tmp_path, asked, where):
    file = tmp_path / "journal"
    whole = check(kept[True], journal=str(file))
    data = file.read_bytes()
    file.write_bytes(data[:where])
    left = data[:where].count(b"\n")
    assert left < 1 + PIECES
    asked.clear()
    assert check(kept[True], journal=str(file)) == whole
    assert len(asked) == PIECES - max(0, left - 1)
    assert sorted(lines(file)) == sorted(data.splitlines(keepends=True))


def test_zeros_that_a_power_cut_left_are_dropped(kept, tmp_path):
    file = tmp_path / "journal"
    whole = check(kept[False], journal=str(file))
    data = file.read_bytes()
    file.write_bytes(data[:-10] + bytes(4096))
    assert check(kept[False], journal=str(file)) == whole
    assert file.read_bytes() == data


@pytest.mark.parametrize(("number", "message"), [(0, "is no journal of a check"), (7, "is damaged in line 8")])
def test_a_damaged_line_is_no_result(kept, tmp_path, number, message):
    file = tmp_path / "journal"
    check(kept[False], journal=str(file))
    told = lines(file)
    told[number] = told[number].replace(b"0", b"1", 1)
    file.write_bytes(b"".join(told))
    with pytest.raises(InputError, match=message):
        check(kept[False], journal=str(file))


# --------------------------------------------------------------------------------------------- the same check only


def touch(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def behind_its_back(file: Path) -> None:
    """Other bytes of the same size and time."""
    times, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def changed(told: dict[str, Any]) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **told}))


CHANGES = {
    "base": ("base/model.safetensors", touch),
    "merged": ("merged/model.safetensors", touch),
    "factors": ("adapter/adapter_model.safetensors", touch),
    "behind": ("merged/model.safetensors", behind_its_back),
    "alpha": ("adapter/adapter_config.json", changed({"lora_alpha": 9})),
    "model": ("base/config.json", changed({"model_type": "llama"})),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_journal_of_files_that_changed_is_refused(places, tmp_path, case):
    file = tmp_path / "journal"
    check(places, journal=str(file))
    before = file.read_bytes()
    name, change = CHANGES[case]
    change(tmp_path / name)
    with pytest.raises(InputError, match=r"is of another check: .* or a file was changed since") as told:
        check(places, journal=str(file))
    assert "remove this one" in told.value.hint
    assert file.read_bytes() == before


OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {"weights": [2.0]},
    "exclude": {"exclude": ["*.layers.3.*"]},
    "combination": {"combination": "linear"},
    "shard": {"shard": (1, 2)},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_journal_of_other_options_is_refused(kept, tmp_path, case):
    file = tmp_path / "journal"
    check(kept[False], journal=str(file))
    with pytest.raises(InputError, match=r"of another check|the journal of a whole check, not of shard 1/2"):
        check(kept[False], journal=str(file), **OPTIONS[case])


def test_files_of_combined_adapters_count_too(places, tmp_path):
    file = tmp_path / "journal"
    options = {"journal": str(file), "combination": "linear"}
    check(places, **options)
    touch(tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="of another check"):
        check(places, **options)


@pytest.mark.parametrize("name", ["torch", "transformers", "code"])
def test_a_journal_of_other_versions_is_refused(kept, tmp_path, monkeypatch, name):
    file = tmp_path / "journal"
    check(kept[False], journal=str(file))
    told = {**fingerprint.programs(), name: "0.0"}
    monkeypatch.setattr(fingerprint, "programs", lambda: told)
    with pytest.raises(InputError, match="versions differ"):
        check(kept[False], journal=str(file))


def test_another_spelling_of_the_same_files_is_the_same_check(kept, tmp_path, monkeypatch, asked):
    file = tmp_path / "journal"
    whole = check(kept[False], journal=str(file))
    monkeypatch.chdir(Path(kept[False][0]).parent)
    asked.clear()
    again = check(["base", "./adapter", "merged"], journal=str(file))
    assert asked == []
    assert again["tensors"] == whole["tensors"]


def test_paths_are_written_down_as_text(kept, tmp_path):
    base, adapter, merged = map(Path, kept[False])
    pipeline.check(base, [adapter], merged, journal=str(tmp_path / "journal"))
    assert request_of([str(tmp_path / "journal")]).adapters == (str(adapter),)


def test_rows_seen_under_different_arithmetics_are_looked_at_again(kept):
    base, adapter, merged = kept[False]
    from lora_check.inputs import opened_inputs
    from lora_check.plan import make_plan

    with opened_inputs(base, (adapter,), merged) as opened:
        found = work.job(*opened, make_plan(*opened))
        pairing = next(one for one in found.plan.pairings if one.kind == "target")
        seen = [found.part(pairing, slice(start, start + 48)) for start in (0, 48)]
    assert all(seen)
    assert found.joined(pairing, seen)
    other = next(one.name for one in work.orders_for(pairing) if one.name != seen[0].arithmetic)
    assert found.joined(pairing, [seen[0], replace(seen[1], arithmetic=other)]) is None
    assert found.joined(pairing, [seen[0], None]) is None


# ----------------------------------------------------------------------------------------------------- the file


def test_two_checks_do_not_write_one_journal(kept, tmp_path):
    file = tmp_path / "journal"
    whole = check(kept[False], journal=str(file))
    head = Head(request=request_of([str(file)]), stamp=json.loads(lines(file)[0])["stamp"])
    first = Journal(str(file), head)
    with pytest.raises(UsageError, match="is being written by another check") as told:
        check(kept[False], journal=str(file))
    assert "a journal of its own" in told.value.hint
    first.close()
    assert check(kept[False], journal=str(file)) == whole


REFUSED = {
    "no folder": ("nowhere/journal", "there is no folder"),
    "a folder": ("base", "it is a folder"),
    "tensors": ("new.safetensors", "would replace tensors"),
    "the adapter": ("adapter", "it is a folder"),
    "its configuration": ("adapter/adapter_config.json", "would replace a file of the model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_journal_that_cannot_be_written_is_refused_before_anything_is_read(places, tmp_path, capsys, case):
    name, message = REFUSED[case]
    assert main(["report", *places, "--journal", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_a_journal_beside_the_model_is_gone_on_with_whatever_it_is_called(places, tmp_path):
    file = str(tmp_path / "merged" / "journal.json")
    assert [main(["report", *places, "--journal", file]) for _ in range(2)] == [0, 0]


def test_a_file_that_is_something_else_is_neither_read_nor_written(places, tmp_path, capsys):
    notes = tmp_path / "notes.json"
    notes.write_text('{"peft_type": "LORA"}')
    assert main(["report", *places, "--journal", str(notes)]) == 2
    assert "is no journal of a check" in capsys.readouterr().err
    assert notes.read_text() == '{"peft_type": "LORA"}'
    with pytest.raises(UsageError, match="it is no file"):
        check(places, journal="/dev/null")


def test_a_full_disk_is_a_sentence_and_what_was_written_counts(kept, tmp_path, asked):
    file = tmp_path / "journal"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(UsageError, match=r"could not write .*journal: file too large"):
            check(kept[False], journal=str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    asked.clear()
    assert check(kept[False], journal=str(file)) == check(kept[False])
    assert 0 < len(asked) - PIECES < PIECES


def test_an_empty_file_is_a_new_journal(kept, tmp_path):
    (tmp_path / "journal").touch()
    check(kept[False], journal=str(tmp_path / "journal"))
    assert len(lines(tmp_path / "journal")) == 1 + PIECES


# ------------------------------------------------------------------------------------------------------- results


def there_and_back(results: dict[items.Item, Any], file: Path) -> dict[str, Any]:
    head = Head(request=items.Request(base="a", adapters=("b",), merged="c"), stamp="x")
    first = Journal(str(file), head)
    for item, result in results.items():
        first.add(item, result)
    first.close()
    again = Journal(str(file), head)
    again.close()
    return again.done


def test_every_kind_of_result_comes_back_as_it_was(tmp_path):
    odd = {"worst": 0.1 + 0.2, "signal": 5e-324, "overlap": float("inf"), "noise": -0.0}
    told = Comparison(
        tensor="a\n'\"é", kind="target", recipe="lora-linear", module="a", adapters=(0, 2), shape=(3, 4),
        dtype="bfloat16", verdict=Verdict.REFUTED, exact=False, arithmetic="x", told={"unmoved": True}, **odd,
    )  # fmt: skip
    measure = work.Measure(fits=False, exact=False, arithmetic="x", over_budget=3, **odd)
    parts = [Part(**{name: 0.1 if name not in ("exact", "unmoved") else True for name in Part.__slots__})]
    kinds = [work.Outcome(told, measure), work.Outcome(told), *(work.Glimpse(one, "y") for one in parts), True, None]
    results = {items.Item(place=place, tensor="t", rows=(0, place)): one for place, one in enumerate(kinds)}
    back = there_and_back(results, tmp_path / "journal")
    assert {item.key: repr(one) for item, one in results.items()} == {key: repr(one) for key, one in back.items()}


@pytest.mark.parametrize("pattern", ["LC101/*", "LC130/*", "LC155/*", "LC220/*", "LC303/*", "LC404/*"])
def test_a_journal_of_any_mistake_gives_its_report_again(pattern, tmp_path, asked):
    base, *adapters, merged = made(sorted(CORPUS.glob(pattern))[0], tmp_path)
    options = {"jobs": 1, "journal": str(tmp_path / "journal")}
    reports = [many.plain(pipeline.check(base, adapters, merged, **options).as_dict()) for _ in range(2)]
    assert reports[0] == reports[1]
    assert len(asked) == len(set(asked)) > 0


# -------------------------------------------------------------------------------------------------------- shards


def shards(locations: list[str], count: int, folder: Path) -> tuple[list[str], list[Any]]:
    """Every shard by its own: their journals, and their reports."""
    files = [str(folder / f"{number}-of-{count}") for number in range(1, count + 1)]
    return files, [check(locations, journal=file, shard=(n, count)) for n, file in enumerate(files, start=1)]


@pytest.mark.parametrize(("broken", "count"), [(False, 1), (False, PIECES + 9), (True, 3)])
def test_the_shards_of_a_check_are_the_check(kept, tmp_path, broken, count, monkeypatch):
    monkeypatch.setattr(items, "PIECE_BYTES", 4096)  # tensors are divided among shards
    files, reports = shards(kept[broken], count, tmp_path)
    assert many.plain(pipeline.joined(files, jobs=1).as_dict()) == check(kept[broken])
    for one in reports if count > 1 else []:
        assert one["verdict"] == ("refuted" if one["summary"]["refuted"] else "inconclusive")
        assert "LC305" in {finding["code"] for finding in one["findings"]}
    empty = [one for one in reports if not one["tensors"]]
    assert bool(empty) is (count > PIECES)


def test_a_shard_that_finds_nothing_wrong_ends_with_3_and_its_whole_with_0(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(kept[False][0]).parent)
    for number in (1, 2):
        argv = ["report", "base", "adapter", "merged", "--journal", str(tmp_path / f"{number}")]
        assert main([*argv, "--shard", f"{number}/2"]) == 3
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["merge-reports", "1", "2", "--format", "json"]) == 0
    assert many.plain(json.loads(capsys.readouterr().out)) == check(kept[False])


def test_a_missing_shard_is_told_and_the_same_one_twice_is_no_other(kept, tmp_path, capsys):
    files, _ = shards(kept[False], 3, tmp_path)
    for given in (files[:2], [files[0], files[0], files[2]]):
        assert main(["merge-reports", *given]) == 2
        said = capsys.readouterr().err
        assert "pieces of work are in none of the journals" in said
        assert f"given are {', '.join(file[-6] + '/3' for file in given)}" in said
    assert pipeline.joined([*files, files[0]]).verdict is Verdict.VERIFIED


def test_a_shard_that_was_cut_short_is_not_taken_for_whole(kept, tmp_path):
    files, _ = shards(kept[False], 2, tmp_path)
    data = Path(files[1]).read_bytes()
    Path(files[1]).write_bytes(data[:-1])
    with pytest.raises(UsageError, match=r"^1 of 36 pieces of work are in none of the journals, such as model\."):
        pipeline.joined(files)
    check(kept[False], journal=files[1], shard=(2, 2))
    assert pipeline.joined(files).verdict is Verdict.VERIFIED


def test_shards_of_different_checks_are_not_mixed(kept, tmp_path):
    ours, _ = shards(kept[False], 2, tmp_path)
    (tmp_path / "theirs").mkdir()
    theirs, _ = shards(kept[True], 2, tmp_path / "theirs")
    with pytest.raises(InputError, match="are of different checks"):
        pipeline.joined([ours[0], theirs[1]])


def test_shards_of_files_that_changed_since_are_refused(places, tmp_path):
    files, _ = shards(places, 2, tmp_path)
    touch(tmp_path / "merged" / "model.safetensors")
    with pytest.raises(InputError, match="is of another check"):
        pipeline.joined(files)


@pytest.mark.parametrize("argv", [["--shard", "1/2"], ["--shard", "3/2", "--journal", "x"], ["--shard", "2"]])
def test_a_shard_that_cannot_be_meant_is_a_usage_error(kept, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *kept[False], *argv]) == 2
    assert "shard" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_no_journal_is_not_joined(tmp_path):
    for data in (b"", b"{}\n", b"\xff\n", b'{"kind": "lora_check journal"}\n'):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(LoraCheckError, match="is no journal of a check"):
            pipeline.joined([str(tmp_path / "x")])
    with pytest.raises(LoraCheckError, match="cannot be read"):
        pipeline.joined([str(tmp_path / "absent")])


# ---------------------------------------------------------------------------------------------------- docs/scale.md


def test_the_page_is_what_its_command_prints():
    text = PAGE.read_text()
    command = re.search(r"Made by `python -m (benchmarks\.scale.*)`", text)[1].split()
    assert subprocess.check_output([sys.executable, "-m", *command], text=True, cwd=ROOT) == text


@pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 1)])
def test_the_script_for_a_batch_system_does_what_the_page_says(kept, tmp_path, broken, code):
    script, *_ = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    join = re.search(r"--wrap 'python -m (lora_check merge-reports [^']*)'", PAGE.read_text())[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {**os.environ, "PATH": path, **dict(zip(("BASE", "ADAPTER", "MERGED"), kept[broken], strict=True))}
    for number in (1, 2):
        slurm = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"}
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env={**told, **slurm}, check=True)
    joined = subprocess.run(["bash", "-c", f"python -m {join}"], cwd=tmp_path, env=told, stdout=subprocess.DEVNULL)
    assert joined.returncode == code
    assert many.plain(json.loads((tmp_path / "report.json").read_text())) == check(kept[broken])
    again = subprocess.run(["bash", "-c", script], cwd=tmp_path, env={**told, **slurm, "MERGED": "nowhere"})
    assert again.returncode == 1


def test_floors_are_of_whatever_binds():
    model = scale.Model(name="x", numbers=4e9, size=8e9)
    store = scale.Store(name="y", speed=2e9, shared=True)
    assert scale.seconds(model, store, 1, rate=1e9) == (8.0, "reads")
    assert scale.seconds(model, store, 1, rate=0.5e9) == (16.0, "computes")
    assert scale.seconds(model, store, 16, rate=0.5e9) == (4.0, "reads")
    rows = [{"arm": name, "runs": [{"user": cpu, "system": 1}] * 3} for name, cpu in (("ours", 6), ("start", 1))]
    sizes = [{"merged_bytes": 10e9, "hot": rows}, {"merged_bytes": 90e9, "hot": rows[:1]}]
    assert scale.measured({"sizes": sizes}) == 2e9
