"""fixtures/training: the instruction set, its lengths, the loop, training on, and what report says of the merges.

Small pieces, on the demo model; `python -m fixtures.training` does the same on real weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fixtures.real.merge import load_base
from fixtures.training import instructions, lengths
from fixtures.training.__main__ import RESULTS, as_text
from fixtures.training.examples import IGNORED, Example, drawn, encoded, padded, prompt
from fixtures.training.instructions import Row
from fixtures.training.loop import Schedule, evaluated, train
from fixtures.training.page import page
from fixtures.training.plots import PLOTS, means
from fixtures.training.proving import Slip, proved, slips
from fixtures.training.runs import Run, execute, planned
from fixtures.training.vocabulary import GROUPS, in_words

ROOT = Path(__file__).parents[1]
BASE = ROOT / "lora_check" / "data" / "demo" / "base"
ROWS = instructions.stored()
SHORT = Schedule(steps=4, rate=2e-2, every=2, batch=4, warmup=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(BASE))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of two modules, and of both halves of the rows, which share their targets."""
    out = tmp_path_factory.mktemp("adapters")
    for module in ("q_proj", "down_proj"):
        execute(Run(name=module, modules=(module,), schedule=SHORT), BASE, out)
    for half in instructions.KINDS:
        execute(Run(name=half, half=half, modules=("v_proj", "up_proj"), schedule=SHORT), BASE, out)
    return out


def of_kind(kind: str) -> list[Row]:
    return [row for row in ROWS if row["kind"] == kind]


def row(instruction: str, given: str, output: str) -> Row:
    return Row(kind="letters", instruction=instruction, input=given, output=output)


def test_the_set_comes_out_byte_for_byte() -> None:
    assert instructions.as_text(instructions.made()).encode() == instructions.STORED.read_bytes()
    assert instructions.made(seed=instructions.SEED + 1) != ROWS


def test_the_set_is_varied_and_nothing_held_out_is_trained_on() -> None:
    learned, held_out = instructions.split(ROWS)
    assert len(ROWS) >= 300
    assert len({one["kind"] for one in ROWS}) >= 10
    assert {one["kind"] for one in held_out} == {one["kind"] for one in learned} == {one["kind"] for one in ROWS}
    asked = {(one["kind"], one["input"] or one["instruction"]) for one in learned}
    assert not asked & {(one["kind"], one["input"] or one["instruction"]) for one in held_out}
    assert len(learned) + len(held_out) == len(ROWS) == len(asked) + len(held_out)


def test_the_halves_share_no_row_and_leave_none_out() -> None:
    numbers, text = instructions.half(ROWS, "numbers"), instructions.half(ROWS, "text")
    assert len(numbers) + len(text) == len(ROWS)
    assert not {one["kind"] for one in numbers} & {one["kind"] for one in text}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (812, "eight hundred and twelve"),
        (1_205, "one thousand two hundred and five"),
        (7_004, "seven thousand and four"),
        (999_999, "nine hundred and ninety-nine thousand nine hundred and ninety-nine"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_a_number_without_words(number: int) -> None:
    with pytest.raises(ValueError, match="not between"):
        in_words(number)


def test_outputs_on_numbers_are_right() -> None:
    for one in of_kind("arithmetic"):
        a, sign, b = one["input"].split()
        assert int(one["output"]) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
    for one in of_kind("sorting-numbers"):
        found = sorted(map(int, one["input"].split(", ")))
        wanted = found if one["instruction"].endswith("smallest to the largest.") else found[::-1]
        assert [*map(int, one["output"].split(", "))] == wanted
    for one in of_kind("number-to-words"):
        assert one["output"] == in_words(int(one["input"]))
    for one in of_kind("words-to-number"):
        assert one["input"] == in_words(int(one["output"]))
    for one in (one for one in of_kind("dates") if "days after" in one["instruction"]):
        days = int(one["instruction"].split()[3])
        assert date.fromisoformat(one["output"]) - date.fromisoformat(one["input"]) == timedelta(days=days)


def test_outputs_on_units_and_sequences_are_right() -> None:
    for one in of_kind("units"):
        values = [[*map(float, re.findall(r"[\d.]+", one[part]))] for part in ("input", "output")]
        given, made = (v[0] * 60 + v[1] if len(v) == 2 else v[0] for v in values)
        assert given == (made * 1000 if one["output"].endswith("km") else made)
    for one in of_kind("sequences"):
        asked, found = ([*map(int, re.findall(r"\d+", one[part]))] for part in ("instruction", "output"))
        if one["instruction"].startswith("List"):
            assert found == [asked[1] * n for n in range(1, asked[0] + 1)]
        else:
            assert found == [asked[1] - asked[0] * n for n in range(4)]


def test_outputs_on_tables_are_right() -> None:
    for one in of_kind("tables"):
        cells = [line.split(" | ") for line in one["input"].splitlines()[1:]]
        best = max(cells, key=lambda line: int(line[2]))[0]
        total = str(sum(int(line[2]) for line in cells))
        homes = {f"Where does {name} live?": city for name, city, _ in cells}
        answers = {"Who has the most points?": best, "How many points are there in all?": total} | homes
        assert one["output"] == answers[one["instruction"]]


def test_outputs_on_text_are_right() -> None:
    for one in of_kind("extraction"):
        assert one["output"] in one["input"]
    for one in of_kind("rewriting"):
        if "voice" in one["instruction"]:
            assert re.findall(r"(?<=he )\w+", one["input"])[:1] == re.findall(r"(?<=he )\w+(?=\.)", one["output"])
        else:
            assert one["output"] == one["input"].upper()
    for one in of_kind("letters"):
        word = one["input"]
        answers = {"How many": str(len(word)), "Spell th": "-".join(word), "What is ": word[-1]}
        assert one["output"] == answers[one["instruction"][:8]]
    for one in of_kind("bullets"):
        assert [line.removeprefix("- ") for line in one["output"].splitlines()] == one["input"].split(", ")
    for one in of_kind("formatting"):
        made, line = sorted((one["input"], one["output"]), reverse=True)
        assert ", ".join(f"{key}: {value}" for key, value in json.loads(made).items()) == line
    for one in of_kind("classification"):
        assert one["input"] in GROUPS[one["output"]]
    for one in of_kind("odd-one-out"):
        others = {word for word in one["input"].split(", ") if word != one["output"]}
        assert any(others <= set(group) and one["output"] not in group for group in GROUPS.values())
    for one in of_kind("sorting-words"):
        assert one["output"].split(", ") == sorted(one["input"].split(", "))


def test_lengths() -> None:
    rows = [row("ab", "", "x"), row("abcd", "12", "xyz"), row("abc", "1", "xx")]
    found = {one.part: one for one in lengths.measured(rows, "characters", len)}
    assert (found["instruction"].least, found["instruction"].median, found["instruction"].largest) == (2, 3, 4)
    assert found["input"].counts == {0: 1, 1: 1, 2: 1}
    assert (found["all"].mean, found["all"].p95) == (6.0, 9)


def test_only_the_answer_has_a_loss(tokenizer: Any) -> None:
    rows = [row("the village", "by the sea", "a mill"), row("the mill", "", "and a long road")]
    examples = [encoded(tokenizer, one) for one in rows]
    batch = padded(examples, pad=0)
    for one, example, labels, mask in zip(rows, examples, batch.labels, batch.mask, strict=True):
        answer = tokenizer(one["output"], add_special_tokens=False)["input_ids"]
        assert labels[labels != IGNORED].tolist() == [*answer, tokenizer.eos_token_id]
        assert example.ids[: example.start] == (*tokenizer(prompt(one), add_special_tokens=False)["input_ids"],)
        assert mask.sum() == len(example.ids)
    assert len({len(example.ids) for example in examples}) == 2


def test_the_loss_is_the_one_of_transformers_and_padding_does_not_move_it(tokenizer: Any) -> None:
    model = load_base(BASE, dtype="fp32").eval()
    examples = [encoded(tokenizer, one) for one in ROWS[:90:30]]
    sums, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            alone = padded([example], pad=0)
            count = len(example.ids) - example.start
            sums += model(input_ids=alone.ids, labels=alone.labels).loss.item() * count
            tokens += count
    assert evaluated(model, examples, pad=0) == pytest.approx(sums / tokens, rel=1e-4)
    shifted = [Example(ids=one.ids, start=one.start - 1) for one in examples]
    assert evaluated(model, shifted, pad=0) != pytest.approx(sums / tokens, rel=1e-4)


def test_the_order_of_the_rows() -> None:
    steps = [*drawn(10, 4, 5, seed=0)]
    assert steps == [*drawn(10, 4, 5, seed=0)] != [*drawn(10, 4, 5, seed=1)]
    seen = [one for step in steps for one in step]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [*range(10)]
    assert seen[:10] != seen[10:]


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [Schedule(steps=20, rate=1.0, warmup=4).rate_at(step) for step in range(20)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 20)


def test_training_lowers_the_loss_and_comes_out_the_same(tokenizer: Any) -> None:
    learned, held_out = (
        [encoded(tokenizer, one) for one in part] for part in instructions.split(instructions.half(ROWS, "text"))
    )
    schedule = replace(SHORT, steps=10, rate=5e-3, every=4)
    curves = [train(load_base(BASE, dtype="fp32"), learned, held_out[:8], 0, schedule) for _ in range(2)]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0].held_out] == [0, 4, 8, 10]
    assert curves[0].held_out[-1][1] < curves[0].held_out[0][1] - 0.1
    still = train(load_base(BASE, dtype="fp32"), learned, held_out[:8], 0, replace(schedule, rate=0.0))
    assert still.held_out[-1][1] == still.held_out[0][1]


def test_a_loss_that_is_not_finite_ends_the_training(tokenizer: Any) -> None:
    examples = [encoded(tokenizer, one) for one in ROWS[:8]]
    with pytest.raises(ValueError, match="not finite"):
        train(load_base(BASE, dtype="fp32"), examples, examples, 0, replace(SHORT, rate=float("inf")))


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = Run(name="first", modules=("v_proj", "o_proj"), schedule=SHORT)
    stopped = execute(first, BASE, tmp_path)
    further = execute(replace(first, name="further", start="first", schedule=replace(SHORT, seed=1)), BASE, tmp_path)
    assert further["config_kept"] is True
    assert further["curve"]["held_out"][0][1] == stopped["curve"]["held_out"][-1][1]
    assert (
        further["curve"]["held_out"][-1][1] < stopped["curve"]["held_out"][-1][1] < stopped["curve"]["held_out"][0][1]
    )
    assert further["trainable"] == stopped["trainable"]


def test_what_is_planned() -> None:
    first, then = planned(steps=10, every=5)
    names = [run.name for run in first]
    assert len(names) == len(set(names)) == 16
    assert [run.rank for run in first if run.name == "full"] == [None]
    assert all(run.alpha == 2 * run.rank for run in first if run.name.startswith("rank"))
    assert [run.start for run in then] == ["rank-8"]
    assert sorted(run.modules[0] for run in first if run.name.startswith("module-")) == sorted(first[0].modules)


@pytest.mark.parametrize(
    ("names", "codes"),
    [(("q_proj", "down_proj"), ("LC507", "LC102")), (("numbers", "text"), ("LC127", "LC102"))],
    ids=["apart", "shared"],
)
def test_what_report_says_of_the_merges(
    names: tuple[str, str], codes: tuple[str, str], adapters: Path, tmp_path: Path
) -> None:
    whole, left_out, twice = (
        proved(BASE, slip, tmp_path) for slip in slips([adapters / name for name in names], "some")
    )
    assert (whole["verdict"], whole["refuted"], whole["findings"]) == ("verified", 0, [])
    for seen, code in zip((left_out, twice), codes, strict=True):
        assert seen["verdict"] == "refuted"
        assert [found["code"] for found in seen["findings"] if found["severity"] == "error"] == [code]
    assert not [*tmp_path.iterdir()]


def test_a_merge_of_another_adapter_is_not_taken_for_the_claim(adapters: Path, tmp_path: Path) -> None:
    paths = tuple(adapters / name for name in ("q_proj", "down_proj"))
    foreign = Slip(name="foreign", said="", merged=paths, claimed=(paths[0], adapters / "text"))
    assert proved(BASE, foreign, tmp_path)["verdict"] == "refuted"


def test_means() -> None:
    points = [(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0), (4, 100.0)]
    assert means(points, 2) == [(0.5, 2.0), (2.5, 6.0)]
    assert means(points[:2], 10) == [(0.5, 2.0)]


def test_the_page_is_made_of_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    shown = page(results)
    assert (ROOT / "docs" / "training.md").read_text(encoding="utf-8") == shown
    results["runs"][0]["curve"]["held_out"][-1][1] += 1
    assert page(results) != shown


def test_the_results_are_stored_as_json() -> None:
    results = {"schema": 1, "runs": [{"name": "a", "curve": [[0, 1.5]]}, {"name": "b"}], "merges": []}
    assert json.loads(as_text(results)) == results
    assert {'{"name": "b"}', '"schema": 1,'} <= {*as_text(results).splitlines()}


def test_the_plots_come_out_the_same() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, draw in PLOTS.items():
        assert (svg := draw(results)) == draw(results)
        assert "<svg" in svg
        assert (ROOT / "docs" / name).is_file()
