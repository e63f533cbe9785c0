"""Hold report --manifest against single reports: the same findings, in order, and none that was not looked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_check import batch, manifest, registry, results
from lora_check.__main__ import main
from lora_check.batch import Common, check_all
from lora_check.errors import InputError, UsageError
from lora_check.manifest import Line
from lora_check.means import Means

ROOT = Path(__file__).parents[1]
Q, V, NORM = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "input_layernorm"))
FILE, FACTORS = "model.safetensors", "adapter_model.safetensors"
ALPHA, RANK = 5, 3
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def write(folder: Path, tensors: dict[str, torch.Tensor], file: str = FILE) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    return folder


def base(folder: Path, seed: int) -> Path:
    drawn = torch.Generator().manual_seed(seed)
    shapes = {Q: (12, 10), V: (6, 10), NORM: (10,)}
    return write(folder, {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()})


def adapter(folder: Path, seed: int) -> Path:
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (12, 10), "v_proj": (6, 10)}
    factors = {}
    for name, (rows, columns) in shapes.items():
        key = f"base_model.model.model.layers.0.self_attn.{name}.lora"
        factors[f"{key}_A.weight"] = torch.randn(RANK, columns, generator=drawn)
        factors[f"{key}_B.weight"] = torch.randn(rows, RANK, generator=drawn)
    write(folder, factors, FACTORS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(folder: Path, of: Path, *adapters: Path, factor: float = 1.0) -> Path:
    tensors = load_file(of / FILE)
    for one in adapters:
        factors = load_file(one / FACTORS)
        for name in (Q, V):
            key = f"base_model.model.{name.removesuffix('.weight')}.lora"
            delta = factors[f"{key}_B.weight"] @ factors[f"{key}_A.weight"]
            tensors[name] = tensors[name] + factor * ALPHA / RANK * delta
    return write(folder, tensors)


@dataclass(frozen=True)
class Scene:
    """Two bases, an adapter of each, their merges and a broken one; and lines about them."""

    root: Path

    def line(self, base: str = "base", adapter: str = "adapter", merged: str = "merged", **more: Any) -> dict[str, Any]:
        return {"base": self[base], "adapter": self[adapter], "merged": self[merged], **more}

    def __getitem__(self, name: str) -> str:
        return str(self.root / name)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Two bases in turn; one merge is broken, one cannot be read."""
        return [
            self.line(id="first"),
            self.line("base2", "adapter2", "merged2", id=2),
            self.line(merged="twice"),
            self.line("base2", "adapter2", "nowhere"),
            self.line(),
            self.line("base2", "adapter2", "merged2"),
        ]

    def manifest(self, lines: Sequence[dict[str, Any]]) -> str:
        path = self.root / "lines.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return str(path)

    def run(self, lines: Sequence[dict[str, Any]], *options: str) -> int:
        return main(["report", "--manifest", self.manifest(lines), "--jobs", "1", *options])

    def written(self, lines: Sequence[dict[str, Any]], *options: str) -> list[dict[str, Any]]:
        """The records that end up in out.jsonl, which may be there already."""
        self.run(lines, "--output", self["out.jsonl"], *options)
        return [json.loads(line) for line in Path(self["out.jsonl"]).read_text().splitlines()]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    first, second = base(tmp_path / "base", 1), base(tmp_path / "base2", 2)
    one, two = adapter(tmp_path / "adapter", 3), adapter(tmp_path / "adapter2", 4)
    merged(tmp_path / "merged", first, one)
    merged(tmp_path / "merged2", second, two)
    merged(tmp_path / "twice", first, one, factor=2.0)
    return Scene(tmp_path)


class Counted:
    """Stands before a function of `batch`, counts its calls, and may do something at one of them."""

    def __init__(self, monkeypatch: Patch, name: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.before: Callable[[int], None] = lambda _: None
        self._real = getattr(batch, name)
        monkeypatch.setattr(batch, name, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append(args)
        self.before(len(self.calls))
        return self._real(*args, **options)


@pytest.fixture
def checks(monkeypatch: Patch) -> Counted:
    return Counted(monkeypatch, "checked_open")


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    summary = {
        key: value
        for key, value in record.get("summary", {}).items()
        if key not in ("seconds", "gb_per_second", "cpu_seconds", "read_ceiling_gb_per_second", "bound")
    }
    return {**record, "summary": summary}


# ------------------------------------------------------------------------------------------------------ records


def test_each_record_is_what_a_single_report_says(scene: Scene, capsys: Capture) -> None:
    assert scene.run(scene.lines) == 2
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [one["line"] for one in records] == [1, 2, 3, 4, 5, 6]
    assert [one["id"] for one in records] == ["first", 2, None, None, None, None]
    assert [one["exit_code"] for one in records] == [0, 0, 1, 2, 0, 0]
    assert "LC102" in {one["code"] for one in records[2]["findings"]}
    assert "6 lines: 4 verified, 1 refuted, 1 could not check" in err
    for line, record in zip(scene.lines, records, strict=True):
        given = [line["base"], line["adapter"], line["merged"]]
        code = main(["report", *given, "--jobs", "1", "--format", "json", "--json", scene["error.json"]])
        said = capsys.readouterr().out
        alone = json.loads(said) if said else json.loads(Path(scene["error.json"]).read_text())
        shared = timeless(alone).keys() & timeless(record).keys() - {"inputs"}
        assert code == record["exit_code"]
        assert {"findings", "verdict", "summary"} <= shared or "error" in shared
        assert {key: timeless(alone)[key] for key in shared} == {key: timeless(record)[key] for key in shared}


def test_the_error_of_a_line_is_its_record(scene: Scene) -> None:
    record = scene.written(scene.lines)[3]
    assert record["error"]["code"] == "not-found"
    assert scene["nowhere"] in record["error"]["message"]
    assert "verdict" not in record
    assert "stamp" not in record


def test_a_base_that_lines_take_turns_with_is_opened_once(scene: Scene, monkeypatch: Patch) -> None:
    opened = Counted(monkeypatch, "open_checkpoint")
    scene.run(scene.lines)
    assert [location for (location,) in opened.calls] == [scene["base"], scene["base2"]]
    monkeypatch.setattr(batch, "OPEN_BASES", 1)
    scene.run(scene.lines)
    assert len(opened.calls) == 2 + len(scene.lines)


def test_an_engine_serves_every_line_and_is_closed_once(scene: Scene, monkeypatch: Patch) -> None:
    closed, real = [], registry.load
    engine = replace(real("engines")["local"], close=lambda: closed.append(1))
    found = {**real("engines"), "local": engine}
    monkeypatch.setattr(registry, "load", lambda name, *more: found if name == "engines" else real(name, *more))
    assert scene.run([scene.line(), scene.line("base2", "adapter2", "merged2")]) == 0
    assert closed == [1]


def test_a_base_that_had_to_give_way_is_closed(scene: Scene) -> None:
    bases = batch.Bases()
    first = bases.opened(scene["base"])
    bases.opened(scene["base2"])
    assert first.read(NORM).shape == (10,)
    bases.opened(scene["merged"])
    with pytest.raises(UsageError, match="which is closed"):
        first.read(NORM)
    bases.close()


@pytest.mark.parametrize("looks", [True, False])
def test_a_base_that_was_replaced_is_read_anew(scene: Scene, monkeypatch: Patch, looks: bool) -> None:
    if not looks:
        monkeypatch.setattr(batch, "_unchanged", lambda *_: True)
    lines = [Line(number=n, base=scene["base"], adapters=(scene["adapter"],), merged=scene["merged"]) for n in (1, 2)]
    records = check_all(lines, Common(means=Means(jobs=1)))
    assert next(records)["verdict"] == "verified"
    base(scene.root / "other", 9)
    os.replace(scene.root / "other" / FILE, scene.root / "base" / FILE)
    second = next(records)
    assert second["verdict"] == "refuted" if looks else "was replaced" in second["error"]["message"]


def test_a_base_that_is_gone_is_no_base(scene: Scene) -> None:
    lines = [Line(number=n, base=scene["base"], adapters=(scene["adapter"],), merged=scene["merged"]) for n in (1, 2)]
    records = check_all(lines, Common(means=Means(jobs=1)))
    assert next(records)["verdict"] == "verified"
    os.rename(scene["base"], scene["elsewhere"])
    assert next(records)["error"]["code"] == "not-found"


@pytest.mark.parametrize(
    ("places", "code"),
    [
        (["merged"], 0),
        (["merged", "twice"], 1),
        (["merged", "foreign"], 3),
        (["foreign", "twice", "merged"], 1),
        (["twice", "nowhere", "foreign"], 2),
    ],
)
def test_the_exit_code_is_that_of_the_worst_line(scene: Scene, places: list[str], code: int, capsys: Capture) -> None:
    merged(scene.root / "foreign", scene.root / "base")
    foreign = scene.root / "adapter-foreign"
    write(foreign, {"base_model.model.other.lora_A.weight": torch.ones(3, 4)}, FACTORS)
    (foreign / "adapter_config.json").write_text((scene.root / "adapter" / "adapter_config.json").read_text())
    kinds = {"foreign": "adapter-foreign"}
    assert scene.run([scene.line(adapter=kinds.get(place, "adapter"), merged=place) for place in places]) == code
    words = {0: "verified", 1: "refuted", 2: "could not check", 3: "inconclusive"}
    assert words[code] in capsys.readouterr().err


def test_a_crash_stops_one_line_and_proves_nothing(scene: Scene, checks: Counted) -> None:
    def crash(count: int) -> None:
        if count == 2:
            raise ZeroDivisionError("a mistake\nof ours")

    checks.before = crash
    records = scene.written([scene.line(), scene.line(), scene.line()])
    assert [one["exit_code"] for one in records] == [0, 2, 0]
    assert records[1]["error"]["code"] == "crash"
    assert records[1]["error"]["message"] == "ZeroDivisionError: a mistake of ours"


def test_filters_reach_every_line(scene: Scene) -> None:
    [record] = scene.written([scene.line(merged="twice")], "--exclude", Q, "--ignore", "LC1")
    assert record["verdict"] == "refuted"
    assert record["summary"]["tensors"] == 2
    assert record["findings_withheld"] == 1
    assert not [one for one in record["findings"] if one["code"].startswith("LC1")]


def test_weights_and_several_adapters(scene: Scene) -> None:
    adapter(scene.root / "third", 7)
    both = merged(scene.root / "half", scene.root / "base", scene.root / "adapter", factor=0.5)
    merged(both, both, scene.root / "third", factor=2.0)
    line = {"base": scene["base"], "adapters": [scene["adapter"], scene["third"]], "merged": str(both)}
    right, wrong = scene.written([{**line, "weights": [0.5, 2]}, {**line, "weights": [2, 0.5]}])
    assert (right["verdict"], wrong["verdict"]) == ("verified", "refuted")


def test_locations_are_those_of_the_working_folder_or_the_hub(scene: Scene, monkeypatch: Patch) -> None:
    monkeypatch.chdir(scene.root)
    here = {"base": "base", "adapter": "adapter", "merged": "merged"}
    found, hub = scene.written([here, {**here, "base": "org/name"}])
    assert found["verdict"] == "verified"
    assert found["inputs"] == {"base": "base", "adapters": ["adapter"], "merged": "merged"}
    assert "as a hub id" in hub["error"]["message"]


# ------------------------------------------------------------------------------------------------------- resume

KILLED = """
import os, signal, sys
from lora_check import batch
from lora_check.__main__ import main
real, left = batch.checked_open, int(sys.argv[1])
def checked_open(*args, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
batch.checked_open = checked_open
sys.exit(main(sys.argv[2:]))
"""


def killed(scene: Scene, lines: Sequence[dict[str, Any]], after: int) -> list[str]:
    """What a batch leaves that is killed in the check after so many."""
    words = ["report", "--manifest", scene.manifest(lines), "--jobs", "1", "--output", scene["out.jsonl"]]
    command = [sys.executable, "-c", KILLED, str(after), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return Path(scene["out.jsonl"]).read_text().splitlines()


def test_a_batch_that_was_killed_goes_on(scene: Scene, checks: Counted) -> None:
    whole = scene.written(scene.lines)
    assert len(checks.calls) == 5
    Path(scene["out.jsonl"]).unlink()
    first = killed(scene, scene.lines, after=2)
    assert [json.loads(one)["line"] for one in first] == [1, 2]
    with open(scene["out.jsonl"], "a") as file:
        file.write('{"schema": 1, "line": 3, "id": nul')
    second = killed(scene, scene.lines, after=1)
    assert second[:2] == first
    assert [json.loads(one)["line"] for one in second] == [1, 2, 3, 4]
    checks.calls.clear()
    assert [*map(timeless, scene.written(scene.lines))] == [*map(timeless, whole)]
    assert Path(scene["out.jsonl"]).read_text().splitlines()[:3] == second[:3]
    assert len(checks.calls) == 2
    assert not [path for path in scene.root.iterdir() if path.name.startswith(".")]


def test_what_is_done_is_not_done_again_but_for_errors(scene: Scene, checks: Counted) -> None:
    before = scene.written(scene.lines)
    merged(scene.root / "nowhere", scene.root / "base2", scene.root / "adapter2")
    checks.calls.clear()
    after = scene.written(scene.lines)
    assert len(checks.calls) == 1
    assert after[3]["verdict"] == "verified"
    assert after[:3] + after[4:] == before[:3] + before[4:]


def touched_merged(scene: Scene) -> None:
    os.replace(
        merged(scene.root / "new", scene.root / "base", scene.root / "adapter") / FILE, scene["merged"] + "/" + FILE
    )


def changed_adapter_config(scene: Scene) -> None:
    path = scene.root / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"lora_alpha": {ALPHA}', '"lora_alpha": 7'))


def file_beside(scene: Scene) -> None:
    (scene.root / "merged" / "tokenizer.json").write_text("{}")


def same_size_and_time(scene: Scene) -> None:
    """Only the time of the last change to the inode tells."""
    path = scene.root / "base" / FILE
    seen, raw = path.stat(), bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


@pytest.mark.parametrize("change", [touched_merged, changed_adapter_config, file_beside, same_size_and_time])
def test_a_line_whose_inputs_changed_is_checked_again(scene: Scene, checks: Counted, change: Any) -> None:
    lines = [scene.lines[0], scene.lines[1]]
    before = scene.written(lines)
    change(scene)
    checks.calls.clear()
    after = scene.written(lines)
    assert len(checks.calls) == 1
    assert after[0]["stamp"] != before[0]["stamp"]
    assert after[1] == before[1]


@pytest.mark.parametrize(("options", "again"), [([], 0), (["--ignore", "LC1"], 2), (["--exclude", NORM], 2)])
def test_other_options_are_another_batch(scene: Scene, checks: Counted, options: list[str], again: int) -> None:
    scene.written(scene.lines[:2])
    checks.calls.clear()
    scene.written(scene.lines[:2], *options)
    assert len(checks.calls) == again


def test_another_id_is_another_record(scene: Scene) -> None:
    scene.written([scene.line(id="old")])
    assert scene.written([scene.line(id="new")])[0]["id"] == "new"


def test_the_second_of_combined_adapters_counts_too(scene: Scene, checks: Counted) -> None:
    adapter(scene.root / "third", 7)
    line = {
        "base": scene["base"],
        "adapters": [scene["adapter"], scene["third"]],
        "merged": scene["merged"],
        "combination": "linear",
    }
    scene.written([line])
    scene.written([line])
    assert len(checks.calls) == 1
    adapter(scene.root / "third", 8)
    scene.written([line])
    assert len(checks.calls) == 2


def test_lines_that_moved_keep_their_results(scene: Scene, checks: Counted) -> None:
    before = scene.written(scene.lines[:3])
    checks.calls.clear()
    moved = [scene.line(id="new"), scene.lines[2], scene.lines[0]]
    after = scene.written(moved)
    assert len(checks.calls) == 1
    assert [one["line"] for one in after] == [1, 2, 3]
    assert after[1:] == [{**before[2], "line": 2}, {**before[0], "line": 3}]


def test_records_of_a_run_before_the_last_are_found_too(scene: Scene, checks: Counted) -> None:
    first = json.dumps(scene.written(scene.lines)[0])
    stopped = results.Results(scene["out.jsonl"])
    stopped.begin()
    stopped.close()
    assert Path(scene["out.jsonl"]).read_text() == ""
    with open(scene[".out.jsonl.before"], "a") as file:
        file.write('{"schema": 1, "line": 1, "id": nul')
    Path(scene["out.jsonl"]).write_text(json.dumps(json.loads(first) | {"line": 9}) + "\n")
    checks.calls.clear()
    assert len(scene.written(scene.lines)) == 6
    assert len(checks.calls) == 0


@pytest.mark.parametrize(
    "text",
    [
        "notes of mine\n",
        "not even a line",
        '{"schema": 1}\n',
        '{"schema": 1, "line": 1, "verdict": "verified"}\n',
        "[1]\n",
    ],
)
def test_a_file_of_another_kind_is_left_as_it_is(scene: Scene, text: str, capsys: Capture, checks: Counted) -> None:
    path = scene.root / "out.jsonl"
    path.write_text(text)
    assert scene.run(scene.lines, "--output", str(path)) == 2
    assert path.read_text() == text
    assert "holds no records of a batch" in capsys.readouterr().err
    assert not checks.calls


@pytest.mark.parametrize(
    "spoilt",
    [{"exit_code": 0, "verdict": "refuted"}, {"exit_code": 0, "verdict": "fine"}, {"exit_code": 0, "error": {}}],
)
def test_a_record_that_contradicts_itself_is_none(scene: Scene, spoilt: dict[str, Any], capsys: Capture) -> None:
    [record] = scene.written(scene.lines[:1])
    Path(scene["out.jsonl"]).write_text(json.dumps({**record, **spoilt}) + "\n")
    assert scene.run(scene.lines[:1], "--output", scene["out.jsonl"]) == 2
    assert "holds no records" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- manifests

GOOD = b'{"base": "b", "adapter": "a", "merged": "m"}\n'
BAD = {
    "not JSON": (b'{"base": "b", adapter}', "line 3, column 15: not JSON"),
    "no object": (b'["b", "a", "m"]', "line 3: a list where an object belongs"),
    "no UTF-8": (b'{"base": "\xff"}', "line 3, byte 11: not UTF-8"),
    "too deep": (b"[" * 100_000, "line 3: not JSON"),
    "a key twice": (b'{"base": "b", "base": "c", "adapter": "a", "merged": "m"}', "line 3: 'base' is named twice"),
    "no base": (b'{"adapter": "a", "merged": "m"}', "line 3: 'base' is missing"),
    "no adapter": (b'{"base": "b", "merged": "m"}', "line 3: 'adapter' is missing"),
    "both": (b'{"base": "b", "adapter": "a", "adapters": ["a"], "merged": "m"}', "both 'adapter' and 'adapters'"),
    "null": (b'{"base": null, "adapter": "a", "merged": "m"}', "line 3: 'base' is missing"),
    "unknown": (b'{"base": "b", "adapter": "a", "merged": "m", "wieghts": [1]}', "'wieghts' is no key of a manifest"),
    "a number": (b'{"base": 1, "adapter": "a", "merged": "m"}', "line 3: 'base' has to be text"),
    "empty text": (b'{"base": " ", "adapter": "a", "merged": "m"}', "line 3: 'base' has to be text"),
    "no list": (b'{"base": "b", "adapters": "a", "merged": "m"}', "'adapters' has to be a list of locations"),
    "an empty list": (b'{"base": "b", "adapters": [], "merged": "m"}', "'adapters' has to be a list of locations"),
    "NaN": (b'{"base": "b", "adapter": "a", "merged": "m", "weights": [NaN]}', "a list of finite numbers"),
    "beyond": (b'{"base": "b", "adapter": "a", "merged": "m", "weights": [1' + b"0" * 400 + b"]}", "finite numbers"),
    "true": (b'{"base": "b", "adapter": "a", "merged": "m", "weights": [true]}', "a list of finite numbers"),
    "too many": (b'{"base": "b", "adapter": "a", "merged": "m", "weights": [1, 2]}', "2 weights for 1 adapters"),
    "a list as kind": (
        b'{"base": "b", "adapter": "a", "merged": "m", "combination": []}',
        "'combination' has to be text",
    ),
    "a float as id": (b'{"base": "b", "adapter": "a", "merged": "m", "id": 1.5}', "'id' has to be text or a whole"),
    "an id twice": (
        b'{"base": "b", "adapter": "a", "merged": "m", "id": 7}\n{"base": "b", "adapter": "a", "merged": "m", "id": 7}',
        "line 4: line 3 has the id 7 too",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_manifest_is_one_sentence_and_nothing_is_checked(
    case: str, tmp_path: Path, capsys: Capture, checks: Counted
) -> None:
    line, sentence = BAD[case]
    path, out = tmp_path / "lines.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    assert main(["report", "--manifest", str(path), "--output", str(out)]) == 2
    printed, said = capsys.readouterr()
    error, hint = said.splitlines()
    assert error.startswith(f"error: manifest {path}, line ")
    assert sentence in error
    assert hint.startswith("hint: ")
    assert printed == ""
    assert not out.exists()
    assert not checks.calls


def test_a_good_manifest_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    full = {"id": "x", "base": "b", "adapters": ["a", "c"], "merged": "m", "weights": [1, 0.5], "combination": "svd"}
    path.write_bytes(
        GOOD + b"\r\n  \n" + json.dumps({**full}).encode() + b"\r\n" + json.dumps({**full, "id": None}).encode()
    )
    plain, rich, last = manifest.read(str(path))
    assert plain == Line(number=1, base="b", adapters=("a",), merged="m")
    expected = Line(number=4, base="b", adapters=("a", "c"), merged="m", weights=(1.0, 0.5), combination="svd", id="x")
    assert rich == expected
    assert last == replace(expected, number=5, id=None)


@pytest.mark.parametrize("text", [b"", b"\n \n"])
def test_an_empty_manifest_proves_nothing(tmp_path: Path, text: bytes, capsys: Capture) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(text)
    assert main(["report", "--manifest", str(path)]) == 2
    assert "names no merge to check" in capsys.readouterr().err


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest .*absent.jsonl cannot be read: no such file"):
        manifest.read(str(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="is a directory"):
        manifest.read(str(tmp_path))


# ------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["b", "a", "m"], "locations are both given: b, a, m"),
        (["--json", "report.json"], "--json goes with one report"),
        (["--markdown", "report.md"], "--markdown goes with one report"),
        (["--format", "json"], "--format json goes with one report"),
        (["--weights", "1"], "--weights goes with one report"),
        (["--combination", "svd"], "--combination goes with one report"),
        (["--candidate-base", "other"], "--candidate-base goes with one report"),
        (["--journal", "work.journal"], "--journal goes with one report"),
        (["--shard", "1/2"], "--shard goes with one report"),
        (["--all"], "--all goes with one report"),
    ],
)
def test_what_only_one_report_can_have(
    scene: Scene, words: list[str], sentence: str, capsys: Capture, monkeypatch: Patch, checks: Counted
) -> None:
    monkeypatch.chdir(scene.root)
    assert main(["report", "--manifest", scene.manifest(scene.lines), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert not checks.calls


def test_neither_locations_nor_a_manifest(capsys: Capture) -> None:
    assert main(["report"]) == 2
    assert "no location is given" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lines.jsonl", "weights.dat", "merged/model.safetensors", "absent/out.jsonl", "base"])
def test_an_output_that_would_destroy_something(scene: Scene, name: str, capsys: Capture, checks: Counted) -> None:
    assert scene.run([*scene.lines, scene.line(merged="weights.dat")], "--output", scene[name]) == 2
    assert f"could not write {scene[name]}" in capsys.readouterr().err
    assert not checks.calls


def test_lines_and_table_go_to_different_places(scene: Scene, capsys: Capture) -> None:
    scene.run(scene.lines)
    out, err = capsys.readouterr()
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 2, 3, 4, 5, 6]
    assert scene.run(scene.lines, "--output", scene["out.jsonl"]) == 2
    assert capsys.readouterr() == (err, "")
    assert "could not check" in err


def test_a_name_in_the_manifest_cannot_move_the_cursor(scene: Scene, capsys: Capture) -> None:
    scene.run([scene.line(merged="x\x1b[2J", id="y\x1b[2J")])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "y\\x1b[2J" in err


# -------------------------------------------------------------------------------------------- memory, descriptors

LINES, BOUND = 200, 3 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pages() -> mmap:
    """Memory that comes from the system whatever other tests have left free in this process."""
    fresh = mmap(-1, 1 << 15)
    fresh.write(bytes(1 for _ in range(1 << 15)))
    return fresh


def held() -> tuple[int, int]:
    """How many files this process has open, and how many it has mapped."""
    return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(".safetensors")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells a process what it holds")
@pytest.mark.parametrize("hoards", [False, True])
def test_nothing_of_a_line_outlives_it(scene: Scene, monkeypatch: Patch, hoards: bool) -> None:
    if hoards:
        done, kept = batch._done, []
        monkeypatch.setattr(batch, "_done", lambda *args: (kept.append(pages()), done(*args))[1])
    asked = [scene.line(), scene.line("base2", "adapter2", "merged2"), scene.line(merged="nowhere")]
    lines = manifest.read(scene.manifest([asked[number % 3] for number in range(LINES + 60)]))
    records = check_all(lines, Common(means=Means(jobs=1)))
    for _ in range(60):
        next(records)
    before, files = resident(), held()
    for record in records:
        assert record["exit_code"] in (0, 2)
        assert held()[0] == files[0]
    growth = resident() - before
    assert (growth > BOUND) is hoards, growth
    assert held()[1] <= files[1]
