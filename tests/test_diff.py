"""Hold `diff` against a NumPy script written apart: counts, sizes, places; and against its contract: gates and words.

The script reads the files itself and imports nothing of the package.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantised_files
import torch
from memory_peak import private
from safetensors.torch import save_file
from torch import Tensor

import lora_check.diffing.line as line
import lora_check.diffing.measure as measure
from lora_check.__main__ import main
from lora_check.diffing.line import Asking, diff

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "lora_check" / "data" / "demo"
Capture = pytest.CaptureFixture[str]
Tensors = dict[str, Tensor]

# ------------------------------------------------------------------------------------------- the script in NumPy

KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BOOL": "?", "U8": "u1", "BF16": "<u2"}


def numpy_file(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (dtype as the header has it, its raw numbers); bfloat16 as the integers that its bits are."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    found = {}
    for name, one in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in one["data_offsets"])
            found[name] = one["dtype"], np.frombuffer(raw[begin:end], KINDS[one["dtype"]]).reshape(one["shape"])
    return found


def numpy_folder(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: one for file in files for name, one in numpy_file(file).items()}


def in_float64(kind: str, raw: np.ndarray) -> np.ndarray:
    if kind == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)


def script(a: tuple[str, np.ndarray], b: tuple[str, np.ndarray]) -> dict[str, Any]:
    """What `diff` has to say of two tensors of one shape."""
    with np.errstate(invalid="ignore", over="ignore"):
        x, y = in_float64(*a), in_float64(*b)
        if a[0] == b[0]:
            unlike = np.frombuffer(a[1].tobytes(), f"V{a[1].itemsize}") != np.frombuffer(
                b[1].tobytes(), a[1].itemsize * "B" and f"V{a[1].itemsize}"
            )
        else:
            unlike = ((x != y) & ~(np.isnan(x) & np.isnan(y))).reshape(-1)
        kept = np.isfinite(x) & np.isfinite(y)
        change = np.where(kept, y - x, 0.0)
        p, q = np.where(kept, x, 0.0), np.where(kept, y, 0.0)
    norm, of, other = (math.sqrt(math.fsum((one**2).reshape(-1))) for one in (change, p, q))
    largest = float(np.abs(change).max(initial=0.0))
    place = [int(i) for i in np.unravel_index(np.abs(change).argmax(), change.shape)] if largest else None
    return {
        "differing": int(unlike.sum()),
        "largest": largest,
        "place": place,
        "norm": norm,
        "relative": norm / of if of else None,
        "cosine": math.fsum((p * q).reshape(-1)) / of / other if of and other else None,
        "left_out": int((~kept).sum()),
        "nan": {"a": int(np.isnan(x).sum()), "b": int(np.isnan(y).sum())},
        "infinite": {"a": int(np.isinf(x).sum()), "b": int(np.isinf(y).sum())},
    }


# ----------------------------------------------------------------------------------------------------- the files


def worlds() -> tuple[Tensors, Tensors]:
    """A and B: every way in which a tensor can differ, and not differ."""
    torch.manual_seed(7)
    a: Tensors = {
        "h.0.q.weight": torch.randn(37, 11),
        "h.0.k.weight": torch.randn(37, 11).bfloat16(),
        "h.0.v.weight": torch.randn(5, 3, 4).half(),
        "h.1.q.weight": torch.randn(64, 9),
        "h.1.k.weight": torch.randn(37, 11).bfloat16(),
        "h.1.v.bias": torch.tensor([1.0, float("nan"), float("inf"), -0.0, 2.0, float("-inf"), 3.0]),
        "h.2.nan.weight": torch.full((3, 2), float("nan")),
        "h.2.signs.weight": torch.zeros(4, 3),
        "h.2.payload.weight": torch.tensor([0x7FC00000, 0x3F800000], dtype=torch.int32).view(torch.float32),
        "steps": torch.tensor([2**60 + 1, 5]),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
        "wider.weight": torch.randn(6, 5).bfloat16(),
        "narrower.weight": torch.randn(6, 5),
        "other.weight": torch.randn(6, 5),
        "kept.weight": torch.randn(33, 7),
    }
    b = {name: one.clone() for name, one in a.items()}
    b["h.0.q.weight"][36, 10] += 0.5
    b["h.0.k.weight"] += 0.01 * torch.randn(37, 11).bfloat16()
    b["h.0.v.weight"][4, 2, 3] = 9
    b["h.1.q.weight"][:, 0] *= -1
    b["h.1.v.bias"] = torch.tensor([1.0, 5.0, float("inf"), 0.0, float("nan"), float("inf"), 3.5])
    b["h.2.signs.weight"][1] = -0.0
    b["h.2.payload.weight"] = torch.tensor([0x7FC00001, 0x3F800000], dtype=torch.int32).view(torch.float32)
    b["steps"][0] += 1
    b["scalar"] = torch.tensor(4.0)
    b["wider.weight"] = a["wider.weight"].float()
    b["narrower.weight"] = a["narrower.weight"].bfloat16()
    b["other.weight"] = (2 * a["other.weight"]).bfloat16()
    return a, b


def saved(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True)
    names = list(tensors)
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name].clone() for name in names[i::shards]}, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    a, b = worlds()
    return saved(tmp_path / "a", a, shards=3), saved(tmp_path / "b", b)


def outcome(*argv: object, capsys: Capture) -> dict[str, Any]:
    code = main(["diff", *map(str, argv), "--format", "json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == code
    return found


def by_name(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    named = {one["name"]: one for one in found["tensors"]}
    assert len(named) == len(found["tensors"])
    return named


def statuses(a: object, b: object, asking: Asking | None = None) -> dict[str, str]:
    return {one.name: one.status for one in diff(a, b, asking).entries}


# --------------------------------------------------------------------------------------------------- the numbers

CLOSE = 1e-12
"""Sums of some hundred terms in float64, each rounded once: 2^-53 times their number is far below."""


@pytest.mark.parametrize(("tile", "jobs", "read"), [(1 << 15, 1, "map"), (4, 3, "map"), (7, 1, "plain")])
def test_every_number_is_that_of_a_script_in_numpy(
    pair: tuple[Path, Path], tile: int, jobs: int, read: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(measure, "STRIP_ELEMENTS", 5 * tile)
    found = by_name(outcome(*pair, "--jobs", jobs, "--read", read, capsys=capsys))
    ours, theirs = map(numpy_folder, pair)
    assert found.keys() == ours.keys() == theirs.keys()
    for name, one in found.items():
        wanted = script(ours[name], theirs[name])
        same = wanted["differing"] == 0 and ours[name][0] == theirs[name][0]
        assert (one["status"] == "unchanged") == same, name
        for key in ("norm", "relative", "cosine") if same else ():
            del wanted[key]  # of what is the same bit by bit nothing is summed
        for key, value in wanted.items():
            close = pytest.approx(value, rel=CLOSE) if isinstance(value, float) and name != "steps" else value
            if name != "steps" or key in ("differing", "left_out"):
                assert one[key] == close, (name, key)
    assert (found["steps"]["largest"], found["steps"]["place"]) == (1, [0])  # which float64 alone would not see


def test_families_and_total_pool_the_tensors_that_are_not_the_same(pair: tuple[Path, Path], capsys: Capture) -> None:
    found = outcome(*pair, capsys=capsys)
    ours, theirs = map(numpy_folder, pair)
    [family] = [one for one in found["families"] if one["family"] == "q"]
    names = ("h.0.q.weight", "h.1.q.weight")
    apart = [script(ours[name], theirs[name]) for name in names]
    norms = math.hypot(*(one["norm"] for one in apart)), math.hypot(*(np.linalg.norm(ours[name][1]) for name in names))
    assert (family["tensors"], family["changed"], family["unchanged"]) == (2, 2, 0)
    assert family["sizes_of_changed"]["differing"] == sum(one["differing"] for one in apart)
    assert family["sizes_of_changed"]["relative"] == pytest.approx(norms[0] / norms[1], rel=1e-6)
    assert found["summary"]["tensors"] == len(ours)
    assert found["summary"]["sizes_of_changed"]["left_out"] == 5
    assert sum(one["tensors"] for one in found["families"]) == len(ours)
    assert [one["tensors"] == one["unchanged"] for one in found["families"]] == sorted(
        one["tensors"] == one["unchanged"] for one in found["families"]
    )


def test_bits_decide_what_is_the_same(pair: tuple[Path, Path], capsys: Capture) -> None:
    found = by_name(outcome(*pair, capsys=capsys))
    told = {name: (one["status"], one["differing"], one["differing_in_bits_only"]) for name, one in found.items()}
    assert told["h.2.signs.weight"] == ("changed", 3, 3)
    assert told["h.2.payload.weight"] == ("changed", 1, 1)
    assert told["h.2.nan.weight"] == ("unchanged", 0, 0)
    assert found["h.2.nan.weight"]["nan"] == {"a": 6, "b": 6}
    assert told["h.1.v.bias"] == ("changed", 5, 1)
    assert told["empty"] == ("unchanged", 0, 0)


def test_a_change_of_dtype_is_told_with_what_it_did_to_the_numbers(pair: tuple[Path, Path], capsys: Capture) -> None:
    found = by_name(outcome(*pair, capsys=capsys))
    kinds = {name: one["conversion"] for name, one in found.items() if one["status"] == "retyped"}
    assert kinds == {"wider.weight": "equal", "narrower.weight": "rounded", "other.weight": "differs"}
    back = by_name(outcome(pair[1], pair[0], capsys=capsys))
    assert back["narrower.weight"]["conversion"] == "rounded-back"


def test_whole_numbers_that_float64_cannot_hold_are_not_equal_to_what_it_makes_of_them(tmp_path: Path) -> None:
    a, b = torch.tensor([2**60 + 1, 7]), torch.tensor([2.0**60, 7.0], dtype=torch.float64)
    [one] = diff({"x": a}, {"x": b}).entries
    assert (one.status, one.conversion, one.sizes.differing) == ("retyped", "rounded", 1)
    [same] = diff({"x": torch.tensor([2**60, 7])}, {"x": b}).entries
    assert same.conversion == "equal"


def test_sums_that_float64_cannot_hold_are_told_and_not_lost(capsys: Capture, tmp_path: Path) -> None:
    x = torch.tensor([1e200, 1.0], dtype=torch.float64)
    folders = [
        saved(tmp_path / name, {"x": one})
        for name, one in (("a", x), ("b", 2 * x), ("c", x * 1e-250), ("d", x * 2e-250))
    ]
    large = by_name(outcome(*folders[:2], capsys=capsys))["x"]
    assert (large["differing"], large["largest"], large["norm"], large["relative"]) == (2, 1e200, None, None)
    assert main(["diff", *map(str, folders[:2])]) == 0
    assert "beyond float64" in capsys.readouterr().out
    small = by_name(
        outcome(
            *[
                saved(tmp_path / n, {"x": torch.tensor([v], dtype=torch.float64)})
                for n, v in (("e", 1e-200), ("f", 2e-200))
            ],
            capsys=capsys,
        )
    )["x"]
    assert (small["differing"], small["largest"], small["norm"]) == (1, 1e-200, None)


# --------------------------------------------------------------------------------------------------------- gates


def gate(pair: tuple[Path, Path], *argv: str, capsys: Capture) -> tuple[int, list[dict[str, Any]]]:
    found = outcome(*pair, *argv, capsys=capsys)
    words = {0: "verified", 1: "refuted", 3: "inconclusive"}
    assert found["verdict"] == words[found["exit_code"]]
    return found["exit_code"], found["findings"]


MET = (
    ("--expect-changed", "h.0.*"),
    ("--expect-unchanged", "kept.*"),
    ("--expect-changed", "*.q.weight", "--expect-unchanged", "mask", "--expect-unchanged", "h.2.nan.*"),
    ("--expect-changed", "other.weight"),
    ("--expect-changed", "h.0.*", "--exclude", "kept.*"),
)
NOT_MET = {
    ("--expect-changed", "kept.*"): ["kept.weight"],
    ("--expect-changed", "h.1.*"): ["h.1.k.weight"],
    ("--expect-unchanged", "h.2.*"): ["h.2.payload.weight", "h.2.signs.weight"],
    ("--expect-unchanged", "wider.weight"): ["wider.weight"],
    ("--expect-changed", "wider.weight"): ["wider.weight"],
    ("--expect-changed", "narrower.weight"): ["narrower.weight"],
    ("--expect-unchanged", "nothing"): [],
    ("--expect-changed", "H.0.*"): [],
    ("--expect-changed", "h.0.*", "--expect-unchanged", "h.0.q.*"): ["h.0.q.weight"],
    ("--expect-unchanged", "*.[qk].weight", "--exclude", "h.1.*"): ["h.0.k.weight", "h.0.q.weight"],
}
OPEN = {
    ("--expect-unchanged", "kept.*", "--exclude", "kept.*"): ["kept.weight"],
    ("--expect-changed", "*.q.weight", "--include", "h.0.*"): ["h.1.q.weight"],
}


@pytest.mark.parametrize("argv", MET)
def test_what_is_as_expected_exits_with_0(pair: tuple[Path, Path], argv: tuple[str, ...], capsys: Capture) -> None:
    assert gate(pair, *argv, capsys=capsys) == (0, [])


@pytest.mark.parametrize("argv", NOT_MET)
def test_what_is_not_as_expected_exits_with_1(pair: tuple[Path, Path], argv: tuple[str, ...], capsys: Capture) -> None:
    code, [finding] = gate(pair, *argv, capsys=capsys)
    against = [name for name in finding["tensors"] if not (name.startswith("h.1.") and "--exclude" in argv)]
    assert (code, finding["severity"], sorted(against)) == (1, "error", NOT_MET[argv])
    assert NOT_MET[argv] or "neither A nor B has a tensor of such a name" in finding["message"]


@pytest.mark.parametrize("argv", OPEN)
def test_what_was_not_looked_at_is_not_as_expected(
    pair: tuple[Path, Path], argv: tuple[str, ...], capsys: Capture
) -> None:
    code, [finding] = gate(pair, *argv, capsys=capsys)
    assert (code, finding["severity"], finding["tensors"]) == (3, "warning", OPEN[argv])


def test_without_expectations_all_has_to_be_compared(pair: tuple[Path, Path], capsys: Capture) -> None:
    whole = outcome(*pair, capsys=capsys)
    assert (whole["exit_code"], whole["verdict"]) == (0, None)
    part = outcome(*pair, "--exclude", "kept.*", capsys=capsys)
    assert (part["exit_code"], part["verdict"], by_name(part)["kept.weight"]["status"]) == (
        3,
        "inconclusive",
        "skipped",
    )
    apart = diff({"x": torch.ones(2)}, {"y": torch.ones(2)})
    assert (apart.exit_code, len(apart.entries)) == (3, 2)


STRANGE = '{{"{}":{{"dtype":"ZZ9","shape":[4],"data_offsets":[0,8]}}}}'


def strange(path: Path, name: str) -> Path:
    """A file with one tensor in a dtype that nobody knows."""
    header = STRANGE.format(name).encode().ljust(96)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return path


def test_a_tensor_in_a_dtype_that_nobody_knows_is_not_decided(tmp_path: Path, capsys: Capture) -> None:
    a, b = strange(tmp_path / "a.safetensors", "x"), strange(tmp_path / "b.safetensors", "x")
    for argv in ((), ("--expect-unchanged", "x"), ("--expect-changed", "x")):
        found = outcome(a, b, *argv, capsys=capsys)
        assert (found["exit_code"], found["verdict"]) == (3, "inconclusive")
        assert by_name(found)["x"]["status"] == "unread"
        assert "zz9" in by_name(found)["x"]["reason"]


def test_bits_of_a_dtype_without_arithmetic_are_compared_and_its_numbers_are_not(
    tmp_path: Path, capsys: Capture
) -> None:
    def four_bits(name: str, data: bytes) -> Path:
        header = b'{"x":{"dtype":"F4","shape":[2,8],"data_offsets":[0,8]}}'.ljust(64)
        (tmp_path / name).write_bytes(struct.pack("<Q", len(header)) + header + data)
        return tmp_path / name

    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no dtype of 4-bit floats")
    a, b = four_bits("a.safetensors", bytes(8)), four_bits("b.safetensors", bytes(7) + b"\1")
    found = outcome(a, b, "--expect-changed", "x", capsys=capsys)
    one = by_name(found)["x"]
    assert (found["exit_code"], one["status"], one["differing"], one["norm"]) == (0, "changed", 1, None)
    again = four_bits("c.safetensors", bytes(8))
    assert outcome(a, again, "--expect-unchanged", "x", capsys=capsys)["exit_code"] == 0
    save_file({"x": torch.zeros(2, 4)}, tmp_path / "d.safetensors")
    wide = outcome(a, tmp_path / "d.safetensors", "--expect-changed", "x", capsys=capsys)
    assert (wide["exit_code"], by_name(wide)["x"]["conversion"]) == (3, "unknown")


# --------------------------------------------------------------------------------------------------------- names


def test_what_only_one_of_them_has_is_told_once(tmp_path: Path, capsys: Capture) -> None:
    x = torch.ones(3, 2)
    a = saved(tmp_path / "a", {"both": x, "old": x, "grown": x, "turned": x})
    b = saved(tmp_path / "b", {"both": x, "new": x, "grown": torch.cat([x, x]), "turned": torch.ones(2, 3)})
    found = by_name(outcome(a, b, capsys=capsys))
    told = {name: one["status"] for name, one in found.items()}
    assert told == {
        "both": "unchanged",
        "old": "only in A",
        "new": "only in B",
        "grown": "reshaped",
        "turned": "reshaped",
    }
    assert (found["grown"]["rows_compared"], found["grown"]["differing"]) == (3, 0)
    assert "differing" not in found["turned"]
    for name in ("old", "new", "grown", "turned"):
        assert main(["diff", str(a), str(b), "--expect-unchanged", name]) == 1
    assert [main(["diff", str(a), str(b), "--expect-changed", name]) for name in ("old", "new", "grown")] == [1, 1, 0]


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("stored_in", ["A", "B"])
def test_a_head_that_one_of_them_has_in_its_embedding_is_tied_and_compared(tmp_path: Path, stored_in: str) -> None:
    x, other = torch.randn(5, 4), torch.randn(5, 4)
    config = {"tie_word_embeddings": True}

    def compared(head: Tensor, name: str) -> Any:
        with_head = saved(tmp_path / name / "with", {EMBEDDING: x, HEAD: head}, config=config)
        without = saved(tmp_path / name / "without", {EMBEDDING: x}, config=config)
        found = diff(with_head, without) if stored_in == "A" else diff(without, with_head)
        return {one.name: one for one in found.entries}

    same = compared(x, "same")
    assert {name: one.status for name, one in same.items()} == {EMBEDDING: "unchanged", HEAD: "unchanged"}
    assert (same[HEAD].tied, same[HEAD].other) == ({"A": "B", "B": "A"}[stored_in], EMBEDDING)
    assert (
        compared(other, "other")[HEAD].status == "changed"
    )  # a loader drops these numbers, and nobody may call that nothing


def test_a_head_that_nothing_ties_is_only_in_one_of_them(tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    a = saved(tmp_path / "a", {EMBEDDING: x, HEAD: x}, config={"tie_word_embeddings": False})
    b = saved(tmp_path / "b", {EMBEDDING: x}, config={"tie_word_embeddings": False})
    assert statuses(a, b) == {EMBEDDING: "unchanged", HEAD: "only in A"}


@pytest.mark.parametrize("prefix", ["model.", "base_model.model."])
def test_names_that_differ_by_a_prefix_are_paired_and_said_to_be(tmp_path: Path, prefix: str, capsys: Capture) -> None:
    plain = {f"layers.{i}.q_proj.weight": torch.randn(4, 3) for i in range(3)}
    moved = {f"{prefix}{name}": one.clone() for name, one in plain.items()}
    moved[f"{prefix}layers.1.q_proj.weight"][0, 0] = 9
    a, b = saved(tmp_path / "a", plain), saved(tmp_path / "b", moved)
    for pair in ((a, b), (b, a)):
        found = outcome(*pair, "--expect-changed", "layers.1.*", capsys=capsys)
        assert {one["status"] for one in found["tensors"]} == {"changed", "unchanged"}
        assert found["exit_code"] == 0
        assert {one["name"] for one in found["tensors"]} | {one["other_name"] for one in found["tensors"]} == {
            *plain,
            *moved,
        }


def test_tensors_that_are_stored_in_codes_are_compared_as_codes_and_then_as_numbers(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(256, 128).bfloat16(), "norm.weight": torch.ones(8)}
    coded = quantised_files.in_fp8(tensors, ["a.weight"])
    folders = {
        "a": coded,
        "same": coded,
        "codes": {name: one.clone() for name, one in coded.items()},
        "decoded": quantised_files.from_fp8(coded),
    }
    [codes] = [name for name, one in coded.items() if one.dtype == torch.float8_e4m3fn]
    folders["codes"][codes].view(torch.uint8)[3, 5] ^= 1
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    places = {
        name: saved(tmp_path / name, one, config=None if name == "decoded" else config) for name, one in folders.items()
    }
    found = {name: {one.name: one for one in diff(places["a"], place).entries} for name, place in places.items()}
    assert {name: one["a.weight"].status for name, one in found.items()} == {
        "a": "unchanged",
        "same": "unchanged",
        "codes": "changed",
        "decoded": "retyped",
    }
    assert found["codes"]["a.weight"].sizes.place == (3, 5)
    assert found["decoded"]["a.weight"].conversion in ("equal", "rounded")
    assert all(one.keys() == tensors.keys() for one in found.values())


def test_other_codes_for_the_same_numbers_are_not_the_same_bits(tmp_path: Path) -> None:
    coded = quantised_files.in_fp8({"a.weight": torch.randn(256, 128).bfloat16()}, ["a.weight"])
    [codes] = [name for name, one in coded.items() if one.dtype == torch.float8_e4m3fn]
    [scales] = [name for name in coded if name != codes]
    coded[codes].view(torch.uint8)[:128] = 0  # a block of zeros, which any scale leaves what it is
    other = coded | {scales: coded[scales].clone()}
    other[scales][0, 0] *= 2
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    [one] = diff(saved(tmp_path / "a", coded, config=config), saved(tmp_path / "b", other, config=config)).entries
    assert (one.status, one.sizes.differing) == ("changed", 0)


# ---------------------------------------------------------------------------------------------------------- show


def shown(pair: tuple[Path, Path], *asked: str, capsys: Capture) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = outcome(*pair, *(word for one in asked for word in ("--show", one)), capsys=capsys)[
        "shown"
    ]
    return found


def test_show_prints_the_values_that_are_asked_for(pair: tuple[Path, Path], capsys: Capture) -> None:
    ours, theirs = map(numpy_folder, pair)
    [one] = shown(pair, "h.0.k.weight[35:, ::5]", capsys=capsys)
    wanted = [[i, j] for i in (35, 36) for j in (0, 5, 10)]
    assert [value["place"] for value in one["values"]] == wanted
    for value in one["values"]:
        x, y = (in_float64(*side["h.0.k.weight"])[tuple(value["place"])] for side in (ours, theirs))
        assert (value["a"], value["b"], value["difference"]) == (x, y, y - x)
    [deep] = shown(pair, "h.0.v.weight[-1, 2]", capsys=capsys)
    assert [value["place"] for value in deep["values"]] == [[4, 2, j] for j in range(4)]
    assert deep["values"][3]["b"] == 9


def test_show_without_an_index_prints_the_first_few_and_the_largest_change(
    pair: tuple[Path, Path], capsys: Capture
) -> None:
    [one] = shown(pair, "h.0.q.weight", capsys=capsys)
    assert [value["place"] for value in one["values"]] == [[0, 0], [0, 1], [0, 2], [0, 3], [36, 10]]
    assert one["values"][-1]["difference"] == pytest.approx(0.5, abs=1e-6)
    several = shown(pair, "h.?.q.weight", "steps", "scalar", "empty", "h.1.v.bias", capsys=capsys)
    told = {one["name"]: one["values"] for one in several}
    assert told.keys() == {"h.0.q.weight", "h.1.q.weight", "steps", "scalar", "empty", "h.1.v.bias"}
    assert told["steps"][0] == {"place": [0], "a": 2**60 + 1, "b": 2**60 + 2, "difference": 1}
    assert told["scalar"] == [{"place": [], "a": 3.0, "b": 4.0, "difference": 1.0}]
    assert told["empty"] == []
    assert [value["a"] for value in told["h.1.v.bias"]][1:3] == ["nan", "inf"]


def test_show_has_a_dash_where_one_side_has_nothing(tmp_path: Path, capsys: Capture) -> None:
    a, b = (
        saved(tmp_path / "a", {"w": torch.ones(2, 2), "z": torch.ones(1)}),
        saved(tmp_path / "b", {"w": torch.ones(3, 2)}),
    )
    assert main(["diff", str(a), str(b), "--show", "w[2]", "--show", "z"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["[2,", "0]", "-", "1"] in [one.split() for one in lines]
    assert ["[0]", "1", "-"] in [one.split() for one in lines]


WRONG_INDEX = (
    "h.0.q.weight[99, 0]",
    "h.0.q.weight[0, 0, 0]",
    "h.0.q.weight[::0]",
    "h.0.q.weight[1:2:3:4]",
    "absent",
    "H.0.q*",
)


@pytest.mark.parametrize("asked", WRONG_INDEX)
def test_what_cannot_be_shown_is_refused_before_anything_is_read(
    pair: tuple[Path, Path], asked: str, capsys: Capture
) -> None:
    assert main(["diff", *map(str, pair), "--show", asked]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 2


def test_many_values_are_cut_and_said_to_be(tmp_path: Path, capsys: Capture) -> None:
    a = saved(tmp_path / "a", {f"w{i}": torch.zeros(40, 30) for i in range(12)})
    b = saved(tmp_path / "b", {f"w{i}": torch.ones(40, 30) for i in range(12)})
    [one] = shown((a, b), "w3[:]", capsys=capsys)
    assert (len(one["values"]), one["more"]) == (1000, 200)
    assert main(["diff", str(a), str(b), "--show", "w*"]) == 0
    assert "--show means 2 tensors more" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- words and contract


def test_the_text_begins_with_what_changed_and_fits_a_screen(capsys: Capture) -> None:
    assert main(["diff", str(DEMO / "base"), str(DEMO / "merged"), "--expect-unchanged", "*norm*"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("as expected: 1 of 1 expectation met; of 38 tensors 28 changed, 10 the same, bit by bit\n")
    assert len(text.splitlines()) < 50
    assert main(["diff", str(DEMO / "base"), str(DEMO / "merged"), "--all"]) == 0
    rows = [one.split() for one in capsys.readouterr().out.splitlines()]
    told = [one[0] for one in rows if one and one[0] in ("changed", "unchanged")]
    assert told == ["changed"] * 28 + ["unchanged"] * 10


def test_two_names_of_one_checkpoint_may_be_compared(capsys: Capture) -> None:
    assert main(["diff", str(DEMO / "base"), str(DEMO / "base"), "--expect-unchanged", "*"]) == 0
    assert "all 38 tensors are the same, bit by bit" in capsys.readouterr().out
    assert main(["diff", str(DEMO / "adapter"), str(DEMO / "adapter"), "--expect-unchanged", "*lora_A*"]) == 0


def test_json_follows_the_contract(pair: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    file, other = tmp_path / "found.json", tmp_path / "found.md"
    argv = [
        *map(str, pair),
        "--expect-changed",
        "mask",
        "--format",
        "markdown",
        "--output",
        str(other),
        "--json",
        str(file),
    ]
    assert main(["diff", *argv]) == 1
    assert capsys.readouterr().out == ""
    found = json.loads(file.read_text())
    head = ("schema", "tool", "command", "inputs", "verdict", "exit_code", "summary", "families", "findings")
    assert tuple(found)[: len(head)] == head
    assert (found["schema"], found["command"], found["verdict"], found["exit_code"]) == (1, "diff", "refuted", 1)
    assert found["inputs"].keys() == {"a", "b"}
    assert found["inputs"]["a"]["tensors"] == len(worlds()[0])
    assert found["findings"][0].keys() >= {
        "code",
        "name",
        "severity",
        "message",
        "help",
        "count",
        "tensors",
        "evidence",
    }
    assert other.read_text().startswith("### not as expected")
    tables = [one for one in other.read_text().splitlines() if one.startswith("|")]
    assert tables
    assert "\x1b" not in other.read_text()


NAME = "w|`*_\x1b[31m\n.weight"


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_names_cannot_move_a_cursor_nor_break_a_table(tmp_path: Path, form: str, capsys: Capture) -> None:
    a, b = saved(tmp_path / "a", {NAME: torch.ones(2)}), saved(tmp_path / "b", {NAME: torch.zeros(2)})
    assert main(["diff", str(a), str(b), "--format", form, "--show", "w*", "--expect-unchanged", "w*"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    blocks = [one.splitlines() for one in out.split("\n\n") if one.startswith("|")]
    assert (len(blocks) > 3) == (form == "markdown")
    assert [one for one in blocks if len({row.replace("\\|", "").count("|") for row in one}) > 1] == []


BAD = {
    "nothing is there": lambda folder: folder / "absent",
    "a folder without weights": lambda folder: (folder / "bare").mkdir() or folder / "bare",
    "a truncated file": lambda folder: truncated(folder),
}


def truncated(folder: Path) -> Path:
    path = folder / "short.safetensors"
    save_file({"w": torch.ones(9)}, path)
    path.write_bytes(path.read_bytes()[:-5])
    return path


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("side", ["A", "B"])
def test_bad_input_gets_one_sentence(tmp_path: Path, kind: str, side: str, capsys: Capture) -> None:
    good, bad = saved(tmp_path / "good", {"w": torch.ones(9)}), BAD[kind](tmp_path)
    file = tmp_path / "found.json"
    locations = [bad, good] if side == "A" else [good, bad]
    assert main(["diff", *map(str, locations), "--json", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {side}: ")
    assert len(said.err.splitlines()) == 2
    assert json.loads(file.read_text())["error"]["message"].startswith(f"{side}: ")


@pytest.mark.parametrize("count", [1, 3])
def test_two_locations_are_asked_for(count: int, capsys: Capture) -> None:
    assert main(["diff", *["x"] * count]) == 2
    assert "two locations" in capsys.readouterr().err


def test_a_file_that_changes_meanwhile_is_no_input(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = line.compare

    def touching(*given: Any) -> Any:
        os.utime(pair[1] / "model.safetensors", (1, 1))
        return real(*given)

    monkeypatch.setattr(line, "compare", touching)
    assert main(["diff", *map(str, pair)]) == 2
    assert "written to" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- memory

LIMIT = 64 << 20
"""Bytes of private memory that one worker may take beyond its libraries."""

PROBE = """
import os, sys
from lora_check.__main__ import main
small, large, whole = sys.argv[1:3], sys.argv[3:5], sys.argv[5]
sys.stdout = open(os.devnull, "w")
main(["diff", *small])
if whole == "whole":
    import lora_check.diffing.line as line
    real = line.matrix
    line.matrix = lambda *given: real(*given).clone()
print("ready", file=sys.stderr, flush=True)
sys.stdin.readline()
sys.exit(main(["diff", *large, "--jobs", "1", "--expect-changed", "*"]))
"""


def sparse(path: Path, last: bytes, size: int) -> Path:
    """One float32 tensor of a single row, of zeros that take no disk, but for its last number."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]}}).encode().ljust(128)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(size - 4, os.SEEK_CUR)
        file.write(last)
    return path


def peak(argv: list[str]) -> int:
    with subprocess.Popen(
        [sys.executable, "-c", PROBE, *argv], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        assert process.stdin
        assert process.stderr.readline() == "ready\n"
        before = most = private(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            most = max(most, private(process.pid))
        assert process.wait() == 0
    return most - before


def test_a_worker_takes_no_more_memory_than_a_tile_does(tmp_path: Path) -> None:
    size = 96 << 20
    small = [str(saved(tmp_path / name, {"w": value * torch.ones(1, 9)})) for name, value in (("a", 1), ("b", 2))]
    large = [str(sparse(tmp_path / f"{i}.safetensors", struct.pack("<f", i), size)) for i in (1, 2)]
    assert peak([*small, *large, "tiles"]) < LIMIT
    assert peak([*small, *large, "whole"]) > LIMIT
