"""Hold `diff` to what a reader must not miss and Markdown must not swallow; its forms are those of a report."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_check.diffing.measure as measure
from lora_check import registry
from lora_check.__main__ import main
from lora_check.diffing.line import diff

Capture = pytest.CaptureFixture[str]
NAN, INF = float("nan"), float("inf")


def saved(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    folder.mkdir(parents=True)
    save_file({name: one.clone() for name, one in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def pair(tmp_path: Path, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    return [saved(tmp_path / "a", a), saved(tmp_path / "b", b)]


def page(*argv: str, capsys: Capture) -> tuple[int, str]:
    code = main(["diff", *argv])
    return code, capsys.readouterr().out


# --------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("tile", [1 << 15, 7])
def test_the_first_number_that_is_lost_is_found_where_numpy_finds_it(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(measure, "STRIP_ELEMENTS", 3 * tile)
    draw = torch.Generator().manual_seed(3)
    a, b = (torch.randn(9, 11, generator=draw) for _ in range(2))
    a[0, 1] = b[0, 1] = NAN  # in both: nothing is lost there
    a[2, 4] = b[2, 4] = INF
    b[5, 3], b[5, 7], a[7, 0] = INF, NAN, NAN
    x, y = a.double().numpy(), b.double().numpy()
    lost = ~((x == y) | (np.isnan(x) & np.isnan(y))) & ~(np.isfinite(x) & np.isfinite(y))
    [one] = diff({"w": a}, {"w": b}).entries
    assert one.sizes is not None
    assert one.sizes.odd == tuple(np.argwhere(lost)[0]) == (5, 3)
    change = np.abs(np.where(np.isfinite(x) & np.isfinite(y), y, 0) - np.where(np.isfinite(x) & np.isfinite(y), x, 0))
    assert one.sizes.place == tuple(np.argwhere(change == change.max())[0])
    other = a.clone()
    other[8, 10] = 99
    [kept] = diff({"w": a}, {"w": other}).entries
    assert kept.sizes is not None
    assert kept.sizes.odd is None


def test_a_number_that_became_nan_is_on_the_first_screen(tmp_path: Path, capsys: Capture) -> None:
    a = {f"h.{i}.w{i}.weight": torch.full((4, 3), 2.0) for i in range(20)}
    b = {name: 3 * one for name, one in a.items()}
    b["h.17.w17.weight"] = a["h.17.w17.weight"].clone()
    b["h.17.w17.weight"][2, 1] = NAN
    places = pair(tmp_path, a, b)
    _, text = page(*places, capsys=capsys)
    assert "1 with NaN or infinity in one where the other has a number" in text.splitlines()[0]
    [table] = [block.splitlines() for block in text.split("\n\n") if block.startswith("tensor ")]
    assert table[2].split()[0] == "h.17.w17.weight"
    assert "[2, 1]" in table[2]
    assert "1 NaN in B" in table[2]
    assert [row for row in text.splitlines() if row.startswith("total") and "1 NaN in B" in row]
    _, shown = page(*places, "--show", "h.17.w17.weight", capsys=capsys)
    assert ["[2,", "1]", "2", "nan", "nan"] in [line.split() for line in shown.splitlines()]
    _, same = page(places[0], places[0], capsys=capsys)
    assert "NaN" not in same


def test_a_scalar_that_became_nan_has_a_place(tmp_path: Path, capsys: Capture) -> None:
    places = pair(tmp_path, {"x": torch.tensor(1.0)}, {"x": torch.tensor(NAN)})
    assert main(["diff", *places, "--format", "json"]) == 0
    [one] = json.loads(capsys.readouterr().out)["tensors"]
    assert (one["place"], one["place_not_finite"], one["nan"]) == (None, [], {"a": 0, "b": 1})
    assert [line for line in page(*places, capsys=capsys)[1].splitlines() if line.startswith("x ") and "[]" in line]


def test_a_dtype_that_cannot_hold_a_number_is_told(tmp_path: Path, capsys: Capture) -> None:
    a = torch.tensor([[1e6, 1.0]])
    _, text = page(*pair(tmp_path, {"x": a}, {"x": a.half()}), capsys=capsys)
    assert "1 retyped, 1 with NaN or infinity" in text.splitlines()[0]
    assert "1 infinite in B" in text
    _, fitting = page(*pair(tmp_path / "fitting", {"x": a / 1e3}, {"x": (a / 1e3).half()}), capsys=capsys)
    assert "infinity" not in fitting


def test_one_element_differs_and_two_differ(tmp_path: Path, capsys: Capture) -> None:
    a, b = torch.ones(2, 3), torch.ones(4, 3)
    b[1, 1] = 5
    assert (
        "the first 2 rows were compared: 1 element differs"
        in page(*pair(tmp_path, {"x": a}, {"x": b}), capsys=capsys)[1]
    )
    b[0, 1] = 5
    other = pair(tmp_path / "other", {"x": a}, {"x": b})
    assert "the first 2 rows were compared: 2 elements differ" in page(*other, capsys=capsys)[1]


# ------------------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize("option", ["--expect-changed", "--expect-unchanged"])
def test_a_pattern_of_nothing_is_no_expectation(option: str, tmp_path: Path, capsys: Capture) -> None:
    places = pair(tmp_path, {"x": torch.ones(2)}, {"x": torch.zeros(2)})
    assert main(["diff", *places, option, ""]) == 2
    assert capsys.readouterr().err.startswith("error: what is expected of ''")
    assert main(["diff", *places, option, "x"]) == (0 if option == "--expect-changed" else 1)


def test_a_pattern_stands_in_quotes(tmp_path: Path, capsys: Capture) -> None:
    places = pair(tmp_path, {"x": torch.ones(2)}, {"x": torch.zeros(2)})
    code, text = page(*places, "--expect-unchanged", "*", "--expect-changed", "q *", capsys=capsys)
    assert code == 1
    assert "1 of 1 tensor of '*': expected unchanged" in text
    assert "'q *' was expected changed, and neither A nor B has a tensor of such a name" in text


def test_one_file_beside_itself_is_told(tmp_path: Path, capsys: Capture) -> None:
    a, copy = pair(tmp_path, {"x": torch.ones(2)}, {"x": torch.ones(2)})
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for other in (a, str(tmp_path / "link"), f"{a}/model.safetensors"):
        assert "the same files as A" in page(a, other, capsys=capsys)[1]
    assert "the same files as A" not in page(a, copy, capsys=capsys)[1]


def test_two_that_have_nothing_in_common_are_said_to(tmp_path: Path, capsys: Capture) -> None:
    a, b = {"x": torch.ones(2)}, {"y": torch.ones(2)}
    code, text = page(*pair(tmp_path, a, b), capsys=capsys)
    assert code == 3
    assert text.startswith("not decided: A and B have no tensor in common; of 2 tensors 1 only in A, 1 only in B")
    assert "in common" not in page(*pair(tmp_path / "more", a, a | b), capsys=capsys)[1]


def test_a_name_without_its_wrapper_is_not_said_to_be_paired(tmp_path: Path, capsys: Capture) -> None:
    prefix = "base_model.model."
    places = pair(tmp_path, {"x": torch.ones(2)}, {f"{prefix}x": torch.ones(2), f"{prefix}y": torch.ones(2)})
    _, text = page(*places, "--all", capsys=capsys)
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith(("only", "unchanged"))}
    assert f"paired with {prefix}x" in rows["unchanged"]
    assert f"in full {prefix}y" in rows["only"]


# ------------------------------------------------------------------------------------------------------- the forms


def crowded(tmp_path: Path) -> list[str]:
    """Tables, lists and notes of every kind on one page."""
    a = {f"h.{i}.w{i % 14}.weight": torch.full((4, 3), 2.0) for i in range(28)}
    b = {name: 3 * one for name, one in a.items()}
    a |= {"turned": torch.ones(2, 3), "half": torch.ones(3), "nan": torch.tensor([NAN]), "old": torch.ones(1)}
    b |= {"turned": torch.ones(3, 2), "half": torch.ones(3).half(), "nan": torch.tensor([NAN]), "new": torch.ones(1)}
    return pair(tmp_path, a, b)


@pytest.mark.parametrize("every", [(), ("--all",)])
def test_markdown_parts_what_belongs_apart(every: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    """A line right below a table becomes a row of it, and one right below a list a part of its last item."""
    argv = ["--format", "markdown", "--show", "turned", "--expect-unchanged", "h.*", *every]
    _, text = page(*crowded(tmp_path), *argv, capsys=capsys)
    lines = text.splitlines()
    for mark in ("|", "- "):
        below = [after for before, after in itertools.pairwise(lines) if before.startswith(mark)]
        assert len(below) > 3
        assert [one for one in below if one and not one.startswith(mark)] == []


@pytest.mark.parametrize(
    "home", ["lora_check.diffing", "lora_check.forwarding", "lora_check.inferring", "lora_check.inspection"]
)
def test_there_is_every_form_that_a_report_has(home: str) -> None:
    assert registry.load("renderers", home).keys() == registry.load("renderers").keys()


@pytest.mark.parametrize("form", [name for name in registry.load("renderers") if name != "text"])
def test_a_form_goes_to_stdout_and_to_a_file(form: str, tmp_path: Path, capsys: Capture) -> None:
    places, file = crowded(tmp_path), tmp_path / "page"
    assert main(["diff", *places, f"--{form}", str(file)]) == 0
    assert capsys.readouterr().out.startswith("of 33 tensors")
    assert main(["diff", *places, "--format", form]) == 0
    told, shown = (
        [line for line in text.splitlines() if not timed(line)] for text in (file.read_text(), capsys.readouterr().out)
    )
    assert told == shown
    assert len(told) > 20


def timed(line: str) -> bool:
    """Whether a line tells how long it took, or what that time was bound by."""
    keys = ("seconds", "cpu_seconds", "gigabytes_per_second", "bound")
    return " s in all" in line or any(f'"{key}"' in line for key in keys)


@pytest.mark.parametrize("form", ["output", "json", "markdown"])
def test_what_cannot_be_written_is_refused_before_anything_is_read(form: str, tmp_path: Path, capsys: Capture) -> None:
    places = crowded(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for file in (tmp_path / "absent" / "page", tmp_path / "a", tmp_path / "a" / "model.safetensors"):
        assert main(["diff", *places, f"--{form}", str(file)]) == 2
        assert capsys.readouterr().err.startswith("error: could not write ")
    assert sorted(tmp_path.rglob("*")) == before
    data = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert struct.unpack("<Q", data[:8])[0] < len(data)


def test_the_json_of_an_outcome_is_whole_whatever_else_is_written(tmp_path: Path, capsys: Capture) -> None:
    file, other = tmp_path / "found.json", tmp_path / "found.md"
    assert main(["diff", *crowded(tmp_path), "--json", str(file), "--markdown", str(other), "--format", "json"]) == 0
    found: list[dict[str, Any]] = [json.loads(text) for text in (file.read_text(), capsys.readouterr().out)]
    assert found[0] == found[1]
    assert len(found[0]["tensors"]) == 33
    assert other.read_text().startswith("### of 33 tensors")
