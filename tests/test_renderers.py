"""Hold the renderers against reports built by hand: what they say, what they leave out, and what they never do."""

from __future__ import annotations

import builtins
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lora_check import registry
from lora_check.reading.throughput import Throughput
from lora_check.report import Report, Style
from lora_check.types import Comparison, Finding, RunInfo, Verdict

NAMES = ("json", "markdown", "text")
MERGE = "abcdefgh"


def render(report: Report, name: str = "text", **style: Any) -> str:
    text: str = registry.load("renderers")[name].render(report, Style(**style))
    return text


def target(layer: int, family: str, verdict: Verdict = Verdict.VERIFIED, **changes: Any) -> Comparison:
    module = f"model.layers.{layer}.self_attn.{family}"
    measured: dict[str, Any] = {"signal": 4.0, "overlap": 4.0, "noise": 0.0004, "arithmetic": "fp32-add"}
    if verdict is Verdict.REFUTED:
        measured = {"signal": 4.0, "overlap": 8.0, "noise": 4.0, "over_budget": 60, "worst": 1300.0, "code": "LC102"}
    return Comparison(
        **{
            "tensor": f"{module}.weight",
            "kind": "target",
            "recipe": "lora-linear",
            "module": module,
            "adapters": (0,),
            "shape": (8, 8),
            "dtype": "bfloat16",
            "verdict": verdict,
            "exact": verdict is Verdict.VERIFIED,
            **measured,
            **changes,
        }
    )


def bystander(name: str = "model.norm.weight", **changes: Any) -> Comparison:
    plain = target(0, "q_proj", signal=0.0, overlap=0.0, noise=0.0, arithmetic=None)
    return replace(plain, tensor=name, kind="bystander", recipe="identity", module=name, adapters=(), **changes)


def report(comparisons: tuple[Comparison, ...], *findings: Finding, **changes: Any) -> Report:
    worst = max((one.verdict for one in comparisons), key=lambda verdict: verdict.rank)
    run = RunInfo(
        command="report",
        tool={"torch": "2.13.0"},
        base={"location": "/models/base", "tensors": 5, "bytes": 2_500_000_000, "dtypes": ["bfloat16"]},
        adapters=({"location": "/adapters/one", "rank": 16, "alpha": 32, "rslora": False, "weight": 1.0},),
        merged={"location": "/models/merged", "tensors": 5},
        bytes_read=3_000_000_000,
        seconds=2.0,
    )
    made: dict[str, Any] = {"run": run, "comparisons": comparisons, "findings": findings, "verdict": worst}
    return Report(**{**made, **changes})


def applied_twice(*tensors: str) -> Finding:
    return Finding(
        code="LC102",
        name="applied-twice",
        severity="error",
        message=f"merged twice in {len(tensors)} of 4 targets",
        tensors=tensors,
        help="merge into a fresh copy of the base",
        evidence={"residual_over_delta": 1.0, "arithmetic": "fp32-add"},
    )


def healthy() -> Report:
    return report((*(target(layer, family) for layer in (0, 1) for family in ("q_proj", "v_proj")), bystander()))


def broken() -> Report:
    bad = tuple(target(layer, "q_proj", Verdict.REFUTED) for layer in (0, 1))
    good = tuple(target(layer, "v_proj") for layer in (0, 1))
    return report((*bad, *good, bystander()), applied_twice(*(one.tensor for one in bad)))


HEALTHY = """\
verified: 5 tensors compared, and all hold what an honest merge writes

base     /models/base
         tensors 5  bytes 2.5 GB  dtypes bfloat16
adapter  /adapters/one
         rank 16  alpha 32
merged   /models/merged
         tensors 5

family      targets    verified    refuted    inconclusive    survival %    SNR dB    x budget
--------  ---------  ----------  ---------  --------------  ------------  --------  ----------
q_proj            2           2          0               0         100.0      40.0           0
v_proj            2           2          0               0         100.0      40.0           0

bystanders 1 of 1 verified
arithmetic fp32-add in 4 of 4 targets

verified: 5 tensors, 5 verified, 0 refuted, 0 inconclusive, 0 findings, 3.0 GB in 2.00 s
"""

BROKEN = """\
refuted: 2 of 5 tensors cannot come from an honest merge

base     /models/base
         tensors 5  bytes 2.5 GB  dtypes bfloat16
adapter  /adapters/one
         rank 16  alpha 32
merged   /models/merged
         tensors 5

family      targets    verified    refuted    inconclusive    survival %    SNR dB    x budget
--------  ---------  ----------  ---------  --------------  ------------  --------  ----------
q_proj            2           0          2               0         200.0       0.0     1.3e+03
v_proj            2           2          0               0         100.0      40.0           0

bystanders 1 of 1 verified
arithmetic fp32-add in 2 of 4 targets

error[LC102] applied-twice: merged twice in 2 of 4 targets
  q_proj 2; layers 0-1
  model.layers.0.self_attn.q_proj.weight  (8, 8) bfloat16  60 of 64 over budget
  model.layers.1.self_attn.q_proj.weight  (8, 8) bfloat16  60 of 64 over budget
  residual over delta 1  arithmetic fp32-add
  help: merge into a fresh copy of the base
  explain LC102

refuted: 5 tensors, 3 verified, 2 refuted, 0 inconclusive, 1 finding, 3.0 GB in 2.00 s
"""


# --------------------------------------------------------------------------------------------------------- text

TIMED = Throughput(size=2_600_000_000, seconds=2.0, cpu_seconds=3.9, workers=2, memory_rate=5.8e9)


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "2.6 GB in 2.00 s (1.3 GB/s of 5.8, bound by compute)"),
        ({"memory_rate": None}, "2.6 GB in 2.00 s (1.3 GB/s, bound by compute)"),
        ({"cpu_seconds": 1.0}, "2.6 GB in 2.00 s (1.3 GB/s of 5.8)"),
        ({"memory_rate": 1.5e9}, "2.6 GB in 2.00 s (1.3 GB/s of 1.5, bound by memory)"),
        (
            {"seconds": 1.5, "cpu_seconds": 1.0, "cold": 2_600_000_000, "cold_seconds": 1.4},
            "2.6 GB in 1.50 s (1.7 GB/s of 1.9, bound by storage), 2.00 s in all",
        ),
        ({"size": 0}, "3.0 GB in 2.00 s"),
    ],
)
def test_the_last_line_tells_the_speed_of_a_pass_that_was_timed(changes: dict[str, Any], end: str) -> None:
    made = replace(healthy(), throughput=replace(TIMED, **changes))
    *_, last = render(made).splitlines()
    assert last.endswith(f"0 findings, {end}")
    assert render(made, "markdown").splitlines()[-1].endswith(end)


def test_the_summary_tells_the_speed_or_that_nothing_timed_it() -> None:
    timed, untimed = (
        json.loads(render(one, "json"))["summary"] for one in (replace(healthy(), throughput=TIMED), healthy())
    )
    assert (timed["gb_per_second"], timed["bound"], timed["cpu_seconds"]) == (1.3, "compute", 3.9)
    assert (untimed["gb_per_second"], untimed["bound"], untimed["cpu_seconds"]) == (None, None, None)


@pytest.mark.parametrize(("made", "page"), [(healthy, HEALTHY), (broken, BROKEN)])
def test_a_merge_reads_like_this(made: Callable[[], Report], page: str) -> None:
    assert render(made()) == page


def test_the_two_pages_differ_where_the_merges_do() -> None:
    assert "error[" in BROKEN
    assert "error[" not in HEALTHY


def large(families: int, layers: int, findings: int) -> Report:
    bad = tuple(target(layer, f"family_{n}", Verdict.REFUTED) for layer in range(layers) for n in range(families))
    one = applied_twice(*(each.tensor for each in bad))
    kinds = tuple(replace(one, code=f"LC1{n:02d}") for n in range(findings))
    return report(bad, *kinds)


def test_a_large_broken_merge_fits_a_screen_and_all_does_not() -> None:
    made = large(families=30, layers=28, findings=9)
    assert render(made).count("\n") < 75
    assert render(made, all=True).count("\n") > 840


def test_what_a_screen_leaves_out_is_counted() -> None:
    page = render(large(families=30, layers=28, findings=9))
    assert "and 837 more" in page
    assert "and 18 families more: 504 refuted" in page
    assert "and 5 findings more: LC104, LC105, LC106, LC107, LC108" in page
    assert "more" not in render(broken())


def test_the_families_that_do_not_fit_are_never_the_broken_ones() -> None:
    good = tuple(target(0, f"family_{n}") for n in range(30))
    page = render(report((*good, target(0, "last", Verdict.REFUTED))))
    assert re.search(r"^last +1 +0 +1", page, re.MULTILINE)
    assert "and 19 families more: all verified" in page


def test_all_has_a_row_for_every_tensor() -> None:
    rows = render(broken(), all=True)
    plain = render(broken())
    for one in broken().comparisons:
        assert re.search(rf"^{re.escape(one.tensor)} +{one.kind}", rows, re.MULTILINE)
        assert not re.search(rf"^{re.escape(one.tensor)} +{one.kind}", plain, re.MULTILINE)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_findings_and_inputs_keep_to_the_width(width: int) -> None:
    finding = replace(
        applied_twice("a.weight", "b.weight"), help="word " * 60, evidence=dict.fromkeys(MERGE, "some words")
    )
    lines = render(report((target(0, "q_proj"),), finding), width=width).splitlines()
    held = [line for line in lines if "word" in line]
    assert max(map(len, held)) <= width
    assert len(held) > 1


def test_evidence_is_never_torn_between_its_name_and_its_value() -> None:
    finding = replace(applied_twice("a.weight"), evidence={f"name_{letter}": 0.125 for letter in MERGE})
    page = render(report((target(0, "q_proj"),), finding), width=50)
    assert [line.count("name") == line.count("0.125") for line in page.splitlines() if "name " in line].count(
        False
    ) == 0
    assert page.count("0.125") == len(MERGE)


def test_colour_only_where_asked_for() -> None:
    assert "\x1b[31mrefuted" in render(broken(), colour=True)
    assert "\x1b" not in render(broken())
    assert re.sub(r"\x1b\[\d*m", "", render(broken(), colour=True)) == BROKEN


def test_errors_come_before_warnings_and_infos() -> None:
    one = applied_twice("a.weight")
    page = render(report((target(0, "q_proj"),), replace(one, severity="info"), replace(one, severity="warning"), one))
    assert re.findall(r"^(\w+)\[LC102\]", page, re.MULTILINE) == ["error", "warning", "info"]


def test_layers_are_told_as_ranges() -> None:
    def told(*layers: int) -> str:
        finding = applied_twice(*(f"model.layers.{n}.mlp.up_proj.weight" for n in layers))
        return render(report((target(0, "q_proj"),), finding))

    assert "up_proj 5; layers 0-2, 7, 9" in told(0, 1, 2, 7, 9)
    assert "up_proj 1; layer 7" in told(7)
    assert "up_proj 6; 6 layers between 0 and 10" in told(0, 2, 4, 6, 8, 10)


def test_a_count_that_the_message_lacks_is_added() -> None:
    bad = broken()
    silent = replace(bad.findings[0], message="merged twice")
    assert "2 of 4 targets; q_proj 2" in render(replace(bad, findings=(silent,)))
    assert "2 of 4 targets; q_proj 2" not in render(bad)


# ------------------------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize("name", ["text", "markdown"])
def test_withheld_findings_are_told(name: str) -> None:
    assert "2 findings withheld by --select or --ignore" in render(replace(broken(), withheld=2), name)
    assert "withheld" not in render(broken(), name)


def test_a_verdict_that_no_tensor_decides_says_what_does() -> None:
    missing = replace(applied_twice(), code="LC201", message="1 tensor is missing")
    refuted = report((target(0, "q_proj"),), missing, verdict=Verdict.REFUTED)
    assert render(refuted).startswith("refuted: 1 tensor is missing\n")
    hidden = replace(refuted, findings=(), withheld=1)
    assert render(hidden).startswith("refuted: a finding that is withheld here decides\n")


def test_inconclusive_never_reads_as_verified() -> None:
    doubtful = report((target(0, "q_proj", Verdict.INCONCLUSIVE), target(1, "q_proj")))
    first = render(doubtful).splitlines()[0]
    assert first == "inconclusive: nothing is refuted, but 1 of 2 tensors could not be decided"


def test_nothing_compared_is_said() -> None:
    page = render(replace(healthy(), comparisons=(), verdict=Verdict.INCONCLUSIVE))
    assert "no tensor was compared" in page
    assert "no targets" in render(report((bystander(),)))


@pytest.mark.parametrize("name", ["text", "markdown"])
def test_two_producers_are_told_apart(name: str) -> None:
    both = tuple(replace(one, variant=variant) for variant in ("unsafe", "safe") for one in healthy().comparisons)
    page = render(report(both), name)
    assert page.index("unsafe merge") < page.index("safe merge", page.index("unsafe merge") + 8)
    assert len(re.findall(r"^\W*q_proj\W+2\W+2\W+0", page, re.MULTILINE)) == 2
    assert "safe merge" not in render(healthy(), name)


# ---------------------------------------------------------------------------------------------- hostile inputs

HOSTILE = "model.\x1b[2J\nverified: all is well|`x`<b>\u202e.weight"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("everything", [False, True])
def test_no_name_can_move_the_cursor_or_begin_a_line(name: str, everything: bool) -> None:
    finding = replace(applied_twice(HOSTILE), message=f"bad {HOSTILE}", evidence={HOSTILE: HOSTILE})
    run = replace(healthy().run, base={"location": HOSTILE})
    made = report((replace(target(0, "q_proj"), tensor=HOSTILE, module=HOSTILE),), finding, run=run)
    page = render(made, name, all=everything)
    assert not set("\x1b\u202e").intersection(page)
    assert not re.search(r"^verified: all is well", page, re.MULTILINE)
    assert "all is well" in page


def cells(line: str) -> int:
    """How many cells GitHub sees: an escaped character, whatever it is, ends none."""
    return len(re.sub(r"\\.", "", line).strip().strip("|").split("|"))


@pytest.mark.parametrize("name", ["a|b", r"a\|b", "`a`|b", "``a`b", "plain"])
def test_markdown_tables_keep_their_columns(name: str) -> None:
    one = replace(target(0, "q_proj"), tensor=f"{name}.weight", module=name)
    page = render(report((one, target(1, "q_proj"))), "markdown", all=True)
    for table in re.findall(r"(?:^\|.*\n?)+", page, re.MULTILINE):
        assert len({cells(line) for line in table.splitlines()}) == 1


def test_a_bare_pipe_would_be_seen() -> None:
    assert cells("| a | b |") == 2
    assert cells("| a|x | b |") == 3
    assert cells(r"| a\|x | b |") == 2
    assert cells(r"| a\\|x | b |") == 3


# --------------------------------------------------------------------------------------------- json, markdown


def test_json_is_the_report_as_a_dict() -> None:
    assert json.loads(render(broken(), "json")) == broken().as_dict()
    assert json.loads(render(broken(), "json")) != healthy().as_dict()


def test_json_has_no_infinity() -> None:
    one = target(0, "q_proj", Verdict.REFUTED, worst=math.inf, noise=math.nan)
    text = render(report((one,), replace(applied_twice("a"), evidence={"x": math.nan})), "json")
    assert json.loads(text, parse_constant=pytest.fail)["tensors"][0]["worst"] is None
    with pytest.raises(pytest.fail.Exception):
        json.loads("NaN", parse_constant=pytest.fail)


def test_markdown_reads_like_this() -> None:
    page = render(broken(), "markdown")
    assert page.startswith("### refuted: 2 of 5 tensors cannot come from an honest merge\n\n| input |")
    assert "| `q_proj` | 2 | 0 | 2 | 0 | 200.0 | 0.0 | 1.3e+03 |\n" in page
    assert r"**error\[LC102\] applied-twice**: merged twice in 2 of 4 targets" in page
    assert "- `model.layers.0.self_attn.q_proj.weight`\n" in page
    assert "LC102" not in render(healthy(), "markdown")


# ------------------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("name", NAMES)
def test_renderers_neither_print_nor_open_files(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = registry.load("renderers")[name]
    monkeypatch.setattr(builtins, "open", lambda *_: pytest.fail("a file was opened"))
    text = renderer.render(broken(), Style(all=True))
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")
    assert text.endswith("\n")


@pytest.mark.parametrize("name", NAMES)
def test_rendering_twice_gives_the_same(name: str) -> None:
    assert render(broken(), name) == render(broken(), name)
    assert render(broken(), name) != render(healthy(), name)
