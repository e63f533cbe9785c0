"""Hold the command line against its contract: exit codes, streams, files, and what each command says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lora_check.__main__ as line
from lora_check import registry
from lora_check.__main__ import main
from lora_check.commands import _output, demo
from lora_check.errors import InputError, NotFoundError, UsageError
from lora_check.oracles import peft as oracle
from lora_check.report import Report
from lora_check.types import Comparison, Finding, Mismatch, Pairing, Plan, RunInfo, TensorMeta, Verdict

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "lora_check" / "data" / "demo"
VERDICTS = (Verdict.VERIFIED, Verdict.REFUTED, Verdict.INCONCLUSIVE)
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def report(verdict: Verdict = Verdict.VERIFIED, *findings: Finding) -> Report:
    one = Comparison(
        tensor="a.weight",
        kind="target",
        recipe="lora-linear",
        module="a",
        adapters=(0,),
        shape=(2, 2),
        dtype="float32",
        verdict=verdict,
        exact=verdict is Verdict.VERIFIED,
    )
    run = RunInfo(command="report", tool={}, base={}, adapters=({},), merged={}, bytes_read=7, seconds=0.5)
    return Report(run=run, comparisons=(one,), findings=findings, verdict=verdict)


FINDING = Finding(code="LC102", name="applied-twice", severity="error", message="merged twice", tensors=("a.weight",))


class Check:
    """Stands for pipeline.check: gives what it is told to and keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.gives: list[Any] = [report()]

    def __call__(self, *inputs: Any, **options: Any) -> Report:
        self.calls.append((inputs, options))
        given = self.gives[min(len(self.calls), len(self.gives)) - 1]
        if isinstance(given, BaseException):
            raise given
        return given


@pytest.fixture
def check(monkeypatch: Patch) -> Check:
    fake = Check()
    monkeypatch.setattr("lora_check.pipeline.check", fake)
    return fake


# ------------------------------------------------------------------------------------------------------- report


@pytest.mark.parametrize(("verdict", "code"), list(zip(VERDICTS, (0, 1, 3), strict=True)))
def test_the_verdict_is_the_exit_code_and_the_first_word(
    verdict: Verdict, code: int, check: Check, capsys: Capture
) -> None:
    check.gives = [report(verdict)]
    assert main(["report", "b", "a", "m"]) == code
    out, err = capsys.readouterr()
    assert out.startswith(f"{verdict.value}: ")
    assert err == ""


@pytest.mark.parametrize("adapters", [["a"], ["a1", "a2", "a3"]])
def test_the_first_location_is_base_and_the_last_is_merged(adapters: list[str], check: Check) -> None:
    assert main(["report", "b", *adapters, "m"]) == 0
    assert check.calls[0][0] == ("b", tuple(adapters), "m")


@pytest.mark.parametrize("locations", [["b"], ["b", "a"]])
def test_fewer_than_three_locations_are_refused(locations: list[str], check: Check, capsys: Capture) -> None:
    assert main(["report", *locations]) == 2
    assert f"at least 3 locations, {len(locations)} given: {', '.join(locations)}" in capsys.readouterr().err
    assert not check.calls


def test_every_option_reaches_the_pipeline(check: Check) -> None:
    words = "report b a m --weights 0.5 2 --combination ties --jobs 3 --include x* --include y* --exclude z"
    assert main([*words.split(), "--select", "lc102,LC4", "--select", "LC5", "--ignore", "LC302"]) == 0
    assert main(["report", "b", "a", "m"]) == 0
    given, plain = (options for _, options in check.calls)
    expected = {
        "weights": [0.5, 2.0],
        "combination": "ties",
        "device": "cpu",
        "jobs": 3,
        "engine": "local",
        "include": ("x*", "y*"),
        "exclude": ("z",),
        "select": ("LC102", "LC4", "LC5"),
        "ignore": ("LC302",),
    }
    assert {key: given[key] for key in expected} == expected
    usual = {
        "weights": None,
        "combination": None,
        "jobs": None,
        "include": (),
        "exclude": (),
        "select": (),
        "ignore": (),
    }
    assert {key: plain[key] for key in usual} == usual


def test_options_of_one_call_do_not_leak_into_the_next(check: Check) -> None:
    main(["report", "b", "a", "m", "--select", "LC1", "--include", "x"])
    main(["report", "b", "a", "m"])
    assert check.calls[1][1]["select"] == check.calls[1][1]["include"] == ()


@pytest.mark.parametrize("wanted", [["--combination", "wild"], ["--device", "cuda"], ["--weights", "1", "2"]])
def test_what_this_version_cannot_do_is_a_usage_error(wanted: list[str], capsys: Capture) -> None:
    inputs = [str(DEMO / name) for name in ("base", "adapter", "merged")]
    assert main(["report", *inputs, *wanted]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r"error: [^\n]+\nhint: [^\n]+\n$", err)
    assert main(["report", *inputs]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--jobs", "0"],
        ["--jobs", "-1"],
        ["--jobs", "two"],
        ["--weights", "nan"],
        ["--weights", "much"],
        ["--select", "E501"],
        ["--ignore", "LC1,"],
        ["--format", "yaml"],
        ["--engine", "abacus"],
        ["--device", "tpu"],
        ["--sel", "LC1"],
        ["--nonsense"],
    ],
)
def test_impossible_options_are_refused_in_two_lines(words: list[str], check: Check, capsys: Capture) -> None:
    assert main(["report", "b", "a", "m", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not check.calls


@pytest.mark.parametrize("words", [["--jobs", "1"], ["--weights", "-0.5"], ["--select", "LC1"], ["--format", "json"]])
def test_their_possible_neighbours_are_not(words: list[str], check: Check) -> None:
    assert main(["report", "b", "a", "m", *words]) == 0
    assert len(check.calls) == 1


# -------------------------------------------------------------------------------------------------------- files


def test_each_renderer_but_text_has_a_file_option(check: Check, tmp_path: Path, capsys: Capture) -> None:
    names = [name for name in registry.load("renderers") if name != "text"]
    words = [word for name in names for word in (f"--{name}", str(tmp_path / name))]
    assert main(["report", "b", "a", "m", *words]) == 0
    text = capsys.readouterr().out
    for name in names:
        main(["report", "b", "a", "m", "--format", name])
        shown = capsys.readouterr().out
        assert (tmp_path / name).read_text() == shown != text
    assert main(["report", "b", "a", "m", "--text", str(tmp_path / "text")]) == 2


def test_json_holds_the_report(check: Check, tmp_path: Path) -> None:
    check.gives = [report(Verdict.REFUTED, FINDING)]
    assert main(["report", "b", "a", "m", "--json", str(tmp_path / "x")]) == 1
    assert json.loads((tmp_path / "x").read_text()) == report(Verdict.REFUTED, FINDING).as_dict()


def test_output_takes_the_place_of_stdout(check: Check, tmp_path: Path, capsys: Capture) -> None:
    main(["report", "b", "a", "m"])
    shown = capsys.readouterr().out
    assert main(["report", "b", "a", "m", "--output", str(tmp_path / "x")]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "x").read_text() == shown


def test_a_write_that_fails_half_way_leaves_the_old_file(
    check: Check, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")
    whole = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        whole(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        assert main(["report", "b", "a", "m", "--json", str(file)]) == 2
    assert "no space left" in capsys.readouterr().err
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    assert main(["report", "b", "a", "m", "--json", str(file)]) == 0
    assert file.read_text() != "old"


def test_a_reader_of_the_old_file_never_sees_the_new_one(check: Check, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")
    with file.open() as reader:
        assert main(["report", "b", "a", "m", "--json", str(file)]) == 0
        assert reader.read() == "old"
    assert file.read_text() != "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_device_is_written_to_and_not_replaced(check: Check) -> None:
    assert main(["report", "b", "a", "m", "--json", os.devnull]) == 0
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("option", ["--json", "--output"])
def test_tensors_and_inputs_are_never_replaced(option: str, check: Check, tmp_path: Path, capsys: Capture) -> None:
    for name in ("model.safetensors", "input", "free"):
        (tmp_path / name).write_text("tensors")
    model, given, free = (str(tmp_path / name) for name in ("model.safetensors", "input", "free"))
    assert main(["report", "b", "a", given, option, model]) == 2
    assert main(["report", "b", "a", given, option, given]) == 2
    assert main(["report", option, model, "a", given]) == 2
    assert not check.calls
    assert {Path(file).read_text() for file in (model, given)} == {"tensors"}
    assert main(["report", "b", "a", given, option, free]) == 0
    assert Path(free).read_text() != "tensors"


THEIRS = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "README.md")
FREE = ("MERGE.md", "report.json", "report.txt", "more.report.json")


@pytest.mark.parametrize("role", range(3))
def test_what_a_model_is_used_with_is_never_replaced(role: int, check: Check, tmp_path: Path, capsys: Capture) -> None:
    model, words = tmp_path / "model", ["b", "a", "m"]
    (model / "more").mkdir(parents=True)
    link, other = tmp_path / "link.json", tmp_path / "other.json"
    link.symlink_to(model / "config.json")
    (model / "linked.json").symlink_to(other)
    words[role] = str(model)
    strange = (model / "modules.json", model / "more" / "settings.json", other)
    for file in (*(model / name for name in THEIRS), *strange):
        file.write_text('{"model_type": "llama"}')
    for file in (*(model / name for name in THEIRS), *strange[:2], link, model / "linked.json"):
        for option in ("--json", "--output"):
            assert main(["report", *words, option, str(file)]) == 2
            assert f"could not write {file}: that would replace a file of the model" in capsys.readouterr().err
        assert file.read_text() == '{"model_type": "llama"}'
    assert not check.calls


def test_a_report_may_lie_beside_the_model_and_be_written_again(check: Check, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "config.json").write_text("{}")
    for name in (*FREE, "../config.json"):
        option = "--json" if name.endswith("json") else "--markdown"
        for _ in range(2):
            assert main(["report", "b", "a", str(model), option, str(model / name)]) == 0
    check.calls.clear()
    check.gives = [NotFoundError("nothing lies at b"), report()]
    for code in (2, 0):
        assert main(["report", "b", "a", str(model), "--json", str(model / "report.json")]) == code


def test_nor_is_what_merge_is_about_to_write(tmp_path: Path, capsys: Capture) -> None:
    for name, said in (("config.json", "would replace a file of the model"), ("merge.json", "nothing lies at")):
        assert main(["merge", str(tmp_path / "b"), "a", str(tmp_path), "--json", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


def test_a_weight_file_given_alone_has_what_lies_beside_it(check: Check, tmp_path: Path) -> None:
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text("{}")
    assert main(["report", "b", "a", str(weights), "--json", str(config)]) == 0
    weights.write_text("tensors")
    assert main(["report", "b", "a", str(weights), "--json", str(config)]) == 2


def test_a_file_that_cannot_be_written_is_told_before_the_check(check: Check, tmp_path: Path, capsys: Capture) -> None:
    file = str(tmp_path / "absent" / "x.json")
    assert main(["report", "b", "a", "m", "--json", file]) == 2
    assert main(["report", "b", "a", "m", "--json", str(tmp_path)]) == 2
    same = str(tmp_path / "x")
    assert main(["report", "b", "a", "m", "--json", same, "--output", same]) == 2
    assert not check.calls
    assert main(["report", "b", "a", "m", "--json", same]) == 0


# ------------------------------------------------------------------------------------------------------- errors


def test_an_error_is_two_lines_on_stderr_and_json_in_the_file(check: Check, tmp_path: Path, capsys: Capture) -> None:
    check.gives = [NotFoundError("nothing lies at b", hint="name a folder"), report()]
    file = tmp_path / "x.json"
    assert main(["report", "b", "a", "m", "--json", str(file)]) == 2
    assert capsys.readouterr() == ("", "error: nothing lies at b\nhint: name a folder\n")
    told = {"code": "not-found", "message": "nothing lies at b", "hint": "name a folder"}
    assert json.loads(file.read_text()) == {"schema": 1, "error": told}
    assert main(["report", "b", "a", "m", "--json", str(file)]) == 0
    assert "error" not in json.loads(file.read_text())


@pytest.mark.parametrize("form", ["--json {}", "--json={}"])
def test_an_unreadable_command_line_leaves_no_old_verdict_in_the_file(form: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"verdict": "verified"}')
    assert main(["report", "b", "a", "m", "--nonsense", *form.format(file).split()]) == 2
    assert json.loads(file.read_text())["error"]["code"] == "usage"


def test_an_error_cannot_move_the_cursor(check: Check, capsys: Capture) -> None:
    check.gives = [InputError("tensor \x1b[2Ja\nverified: b")]
    main(["report", "b", "a", "m"])
    assert capsys.readouterr().err == "error: tensor \\x1b[2Ja\\nverified: b\n"


def test_an_interrupt_is_one_line(check: Check, capsys: Capture) -> None:
    check.gives = [KeyboardInterrupt()]
    assert main(["report", "b", "a", "m"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_crash_is_no_refutation(monkeypatch: Patch, capsys: Capture) -> None:
    def crash() -> int:
        raise ZeroDivisionError("a bug")

    for broken, code in ((crash, 2), (lambda: 1, 1), (lambda: 0, 0)):
        monkeypatch.setattr(line, "main", broken)
        with pytest.raises(SystemExit) as left:
            line.entry()
        assert left.value.code == code
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["rules", "--help"])
def test_a_closed_pipe_is_no_traceback(word: str) -> None:
    command = [sys.executable, "-m", "lora_check", word]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as closed:
        assert closed.stdout
        assert closed.stderr
        closed.stdout.close()
        said = closed.stderr.read()
    assert (closed.returncode, said) == (141, b"")
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


FULL = "error: could not write to stdout: no space left on device\nhint: make room where stdout goes\n"
NOWHERE = {
    "a full stdout": ("rules", ">/dev/full", 2, FULL),
    "a full stdout, with help": ("--help", ">/dev/full", 2, FULL),
    "room": ("rules", ">/dev/null", 0, ""),
    "a closed stdout": ("rules", ">&-", 0, ""),
    "a full stderr": ("report a b c", "2>/dev/full", 2, ""),
    "a closed stderr": ("report a b c", "2>&-", 2, ""),
    "both full": ("report a b c", ">/dev/full 2>&1", 2, ""),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_where_no_stream_takes_anything_the_exit_code_is_still_right(name: str) -> None:
    """Never 1, which is refuted, and never Python's own 120 for what could not be flushed at exit."""
    words, streams, code, said = NOWHERE[name]
    command = f"exec {sys.executable} -m lora_check {words} {streams}"
    run = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (code, said)


def test_no_command_is_an_error_and_help_is_none(capsys: Capture) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in registry.load("commands") if f"    {name}" not in out] == []


# ------------------------------------------------------------------------------------------------------ terminal


class Terminal(io.StringIO):
    """A stream that someone watches."""

    def isatty(self) -> bool:
        return True


def test_progress_only_on_a_terminal(monkeypatch: Patch) -> None:
    assert _output.progress() is None
    watched = Terminal()
    monkeypatch.setattr(sys, "stderr", watched)
    bar = _output.progress()
    assert bar
    with bar(4) as advance:
        advance(4)
    assert "0.00/4.00" in watched.getvalue()


@pytest.mark.parametrize(
    ("environment", "colour"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_colour_only_on_a_terminal_that_wants_it(environment: dict[str, str], colour: bool, monkeypatch: Patch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert not _output.terminal_style().colour
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert _output.terminal_style().colour is colour


def test_a_file_is_never_coloured(check: Check, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    watched = Terminal()
    monkeypatch.setattr(sys, "stdout", watched)
    main(["report", "b", "a", "m", "--output", str(tmp_path / "x")])
    main(["report", "b", "a", "m"])
    assert "\x1b[32mverified" in watched.getvalue()
    assert "\x1b" not in (tmp_path / "x").read_text()


# ------------------------------------------------------------------------------------------------ rules, explain


def test_rules_lists_every_code_once_under_its_range(capsys: Capture) -> None:
    assert main(["rules"]) == 0
    blocks = re.split(r"^(?=LC\dxx)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    listed = {code: block[:3] for block in blocks for code in re.findall(r"^(LC\d{3}) ", block, re.MULTILINE)}
    assert list(listed) == sorted(registry.load("faults"))
    assert all(code.startswith(start) for code, start in listed.items())
    for code, fault in registry.load("faults").items():
        assert re.search(rf"{code} +{fault.name} +{fault.severity} +{re.escape(fault.summary)}", "".join(blocks))


def test_a_page_is_found_by_code_and_by_name(capsys: Capture) -> None:
    for asked in ("LC102", "lc102", "applied-twice", "Applied-Twice"):
        assert main(["explain", asked]) == 0
        assert capsys.readouterr().out == registry.page("faults", "LC102") + "\n"
    assert main(["explain", "LC101"]) == 0
    assert capsys.readouterr().out != registry.page("faults", "LC102") + "\n"


def test_several_pages_come_in_the_order_asked_for(capsys: Capture) -> None:
    main(["explain", "LC102", "LC101"])
    out = capsys.readouterr().out
    assert out.startswith("LC102 applied-twice")
    assert "\n\nLC101 adapter-not-applied" in out


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("aplied-twice", "near it: LC102 applied-twice"),
        ("LC1022", "LC102 applied-twice"),
        ("zzz", "`rules` lists the codes"),
    ],
)
def test_an_unknown_code_names_its_neighbours(asked: str, near: str, capsys: Capture) -> None:
    assert main(["explain", asked]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert near in err


# --------------------------------------------------------------------------------------------------------- plan


def pairing(name: str, undecidable: str = "") -> Pairing:
    meta = TensorMeta(name=name, shape=(4, 4), dtype="bfloat16")
    return Pairing(merged=meta, base=meta, steps=(), module=name.removesuffix(".weight"), undecidable=undecidable)


@pytest.fixture
def planned(monkeypatch: Patch) -> Callable[..., None]:
    """Have the pipeline plan this, and its structure show these findings."""

    def plan_is(plan: Plan, *findings: Finding) -> None:
        monkeypatch.setattr("lora_check.pipeline.plan", lambda *_, **__: plan)
        monkeypatch.setattr("lora_check.findings.structural", lambda _: findings)

    return plan_is


MISSING = replace(FINDING, code="LC201", name="missing-tensor", message="1 tensor is missing", tensors=("b.weight",))
SKIPPED = replace(FINDING, code="LC305", name="tensors-not-checked", severity="info", message="1 tensor not checked")


@pytest.mark.parametrize(
    ("plan", "findings", "code"),
    [
        (Plan(pairings=(pairing("a.weight"),)), [], 0),
        (Plan(pairings=(pairing("a.weight"),), missing=("b.weight",)), [MISSING], 1),
        (Plan(pairings=(pairing("a.weight", "no recipe"),)), [], 3),
        (Plan(pairings=(pairing("a.weight"),)), [SKIPPED], 3),
        (Plan(pairings=(pairing("a.weight", "no recipe"),)), [SKIPPED, MISSING], 1),
    ],
)
def test_plan_answers_with_the_structure(
    plan: Plan, findings: Sequence[Finding], code: int, planned: Callable[..., None], tmp_path: Path, capsys: Capture
) -> None:
    planned(plan, *findings)
    file = tmp_path / "x.json"
    assert main(["plan", "b", "a", "m", "--json", str(file)]) == code
    out, told = capsys.readouterr().out, json.loads(file.read_text())
    assert told["exit_code"] == code
    assert [one["code"] for one in told["findings"]] == [one.code for one in findings]
    assert told["bytes_to_read"] == 64
    assert ("nothing structural is wrong" in out) is not findings
    assert "verdict" not in told


def test_plan_tells_everything_that_is_not_paired(
    planned: Callable[..., None], tmp_path: Path, capsys: Capture
) -> None:
    plan = Plan(
        pairings=(pairing("a.weight"),),
        missing=tuple(f"m{n}" for n in range(5)),
        reshaped=(Mismatch(name="r", expected="(2, 3)", actual="(3, 2)"),),
        orphans=((1, "o"),),
    )
    planned(plan)
    file = tmp_path / "x.json"
    main(["plan", "b", "a", "m", "--json", str(file)])
    out, told = capsys.readouterr().out, json.loads(file.read_text())
    assert "missing: 5  m0, m1, m2, and 2 more\n" in out
    assert "reshaped: 1  r ((2, 3) expected, (3, 2) there)\n" in out
    assert "orphans: 1  o of adapter 2\n" in out
    assert "extra" not in out
    assert told["missing"] == list(plan.missing)
    assert told["reshaped"] == [{"name": "r", "expected": "(2, 3)", "actual": "(3, 2)"}]
    assert told["orphans"] == [{"adapter": 1, "name": "o"}]
    assert told["extra"] == []


def test_plan_of_the_demo_counts_its_families(capsys: Capture) -> None:
    assert main(["plan", *(str(DEMO / name) for name in ("base", "adapter", "merged"))]) == 0
    out = capsys.readouterr().out
    assert re.search(r"target +lora-linear +q_proj +4 +0", out)
    assert re.search(r"bystander +identity +10 +0", out)


# ------------------------------------------------------------------------------------------------------- parity


def test_parity_holds_both_merges_and_the_worse_verdict(check: Check, monkeypatch: Patch, tmp_path: Path) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        oracle, "merge", lambda base, adapters, *, safe: made.append((base, adapters, safe)) or made[-1]
    )
    check.gives = [report(), report(Verdict.REFUTED, FINDING)]
    file = tmp_path / "x.json"
    assert main(["parity", "b", "a1", "a2", "--json", str(file), "--jobs", "2"]) == 1
    assert made == [("b", ("a1", "a2"), False), ("b", ("a1", "a2"), True)]
    assert [inputs for inputs, _ in check.calls] == [("b", ("a1", "a2"), merged) for merged in made]
    assert {(options["command"], options["jobs"]) for _, options in check.calls} == {("parity", 2)}
    told = json.loads(file.read_text())
    assert [(one["variant"], one["verdict"]) for one in told["tensors"]] == [
        ("unsafe", "verified"),
        ("safe", "refuted"),
    ]
    assert [one["message"] for one in told["findings"]] == ["safe merge: merged twice"]
    assert told["summary"]["bytes_read"] == 14
    assert {"peft", "transformers"} <= set(told["tool"])
    check.gives = [report()]
    assert main(["parity", "b", "a"]) == 0


def test_parity_needs_an_adapter(check: Check, capsys: Capture) -> None:
    assert main(["parity", "b"]) == 2
    assert "at least 2 locations, 1 given: b" in capsys.readouterr().err


def test_parity_without_its_libraries_says_what_to_install(monkeypatch: Patch, capsys: Capture) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(oracle, "find_spec", lambda name: None if name == "peft" else object())
        assert main(["parity", "b", "a"]) == 2
    assert capsys.readouterr().err == "error: parity needs peft\nhint: pip install lora_check[parity]\n"


def test_parity_wants_folders(tmp_path: Path) -> None:
    for absent in (str(tmp_path / "absent"), "./absent"):
        with pytest.raises(NotFoundError, match="nothing lies at"):
            oracle.merge(absent, ("a",), safe=True)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(InputError, match="is a file"):
        oracle.merge(str(tmp_path / "model.safetensors"), ("a",), safe=True)
    with pytest.raises(UsageError, match="at least one adapter"):
        oracle.merge(str(tmp_path), (), safe=True)


def test_versions_are_told_without_importing() -> None:
    probe = (
        "import sys; from lora_check.oracles.peft import versions; sys.exit(not versions() or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False).returncode == 0
    assert oracle.versions()["peft"] == __import__("importlib.metadata").metadata.version("peft")


def test_what_a_library_raises_becomes_one_sentence() -> None:
    with (
        pytest.raises(InputError, match=r"^could not load the base b: size mismatch$"),
        oracle._reading("the base", "b"),
    ):
        raise RuntimeError("size mismatch\nfor a\nfor b")
    with (
        pytest.raises(InputError, match=r"^could not load the base b: Error\(s\): a differs$"),
        oracle._reading("the base", "b"),
    ):
        raise RuntimeError("Error(s):\n\ta differs\n\tb differs")
    with pytest.raises(KeyboardInterrupt), oracle._reading("the base", "b"):
        raise KeyboardInterrupt


def test_only_a_model_class_of_transformers_loads_a_base() -> None:
    class Model:
        pass

    library = SimpleNamespace(
        PreTrainedModel=Model, Known=type("Known", (Model,), {}), pipeline=print, AutoModel="auto"
    )
    library.__version__ = "5"

    def loader(*architectures: str) -> Any:
        return oracle._loader(library, SimpleNamespace(architectures=list(architectures)), "b")

    assert loader("Known") is library.Known
    assert loader() == "auto"
    for name in ("pipeline", "Absent"):
        with pytest.raises(InputError, match=f"is a {name}, which transformers 5 does not have"):
            loader(name)


# --------------------------------------------------------------------------------------------------------- demo


def test_demo_verifies_and_refutes(capsys: Capture) -> None:
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert re.findall(r"^(\w+): \d+ tensors?, ", out, re.MULTILINE) == ["verified", "refuted", "refuted"]
    assert "error[LC108]" in out
    assert err == ""


def test_demo_says_what_did_not_come_out(monkeypatch: Patch, capsys: Capture) -> None:
    unbroken = replace(demo.ACTS[1], spoil=None)
    monkeypatch.setattr(demo, "ACTS", (unbroken,))
    assert main(["demo"]) == 1
    assert "one layer put back to the base: expected refuted, came out verified\n" in capsys.readouterr().out


@pytest.mark.parametrize("codes", [("LC108",), ("LC108", "LC102"), ()])
def test_a_refutation_under_another_name_is_a_surprise(codes: tuple[str, ...]) -> None:
    act = replace(demo.ACTS[2], codes=codes)
    named = report(Verdict.REFUTED, FINDING)
    assert (demo.surprise(act, named) == "") is ("LC102" in codes or not codes)
    assert demo.surprise(act, report(Verdict.VERIFIED, FINDING)) != ""


def test_demo_without_its_model_cannot_run(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setattr(demo, "DATA", tmp_path)
    assert main(["demo"]) == 2
    assert "the demo model is not at" in capsys.readouterr().err


def test_demo_leaves_the_shipped_model_as_it_is() -> None:
    before = {file: file.stat().st_mtime_ns for file in DEMO.rglob("*")}
    with contextlib.redirect_stdout(io.StringIO()):
        main(["demo"])
    assert {file: file.stat().st_mtime_ns for file in DEMO.rglob("*")} == before
