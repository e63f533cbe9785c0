"""infer: what kind of change lies between two models, told from their numbers alone.

The models are made here with torch, apart from the package's own merge: W, B and A are drawn, the sum is stored once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_check.__main__ import main
from lora_check.errors import UsageError, WrongInputError
from lora_check.inferring.floors import DEVIATION, Noise, largest_low_rank
from lora_check.inferring.line import infer
from lora_check.inferring.outcome import Change, Inference, Kind
from lora_check.inferring.spectrum import sketch
from lora_check.inferring.words import says

HIGH, WIDE = 192, 320
Q, V = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.v_proj.weight"
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
Model = dict[str, Tensor]


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(seed: int, rows: int = HIGH, columns: int = WIDE) -> Tensor:
    """A weight of standard deviation 0.05, with two rows and a column of larger ones as trained models have them."""
    found = 0.05 * torch.randn(rows, columns, generator=drawn(seed), dtype=torch.float64)
    found[: min(2, rows)] *= 3
    found[:, 5] *= 6
    return found


def low_rank(seed: int, rank: int, size: float, rows: int = HIGH, columns: int = WIDE, fall: float = 0.8) -> Tensor:
    """s B A of that rank whose elements are `size` in the mean; each direction has `fall` of the one before."""
    b = torch.linalg.qr(torch.randn(rows, rank, generator=drawn(seed), dtype=torch.float64))[0]
    a = torch.linalg.qr(torch.randn(columns, rank, generator=drawn(seed + 1), dtype=torch.float64))[0]
    values = fall ** torch.arange(rank, dtype=torch.float64)
    found = (b * values) @ a.T
    return found * size / found.square().mean().sqrt()


def model(dtype: torch.dtype) -> Model:
    """Two layers, a norm with a bias, an embedding and a head."""
    found = {
        pattern.format(layer): weight(10 * layer + place) for layer in (0, 1) for place, pattern in ((1, Q), (2, V))
    }
    found |= {NORM: 1 + weight(50, 1, WIDE)[0], "model.norm.bias": weight(51, 1, WIDE)[0]}
    found |= {EMBEDDING: weight(60, 400, WIDE), HEAD: weight(61, 400, WIDE)}
    return {name: one.to(dtype) for name, one in found.items()}


def changed(base: Model, deltas: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Model:
    """Each sum in float64, stored once."""
    return {name: (one.double() + deltas.get(name, 0)).to(dtype or one.dtype) for name, one in base.items()}


def tuned(rank: int, size: float, patterns: tuple[str, ...] = (Q, V), fall: float = 0.8) -> dict[str, Tensor]:
    """A delta of that rank for both layers."""
    names = [pattern.format(layer) for pattern in patterns for layer in (0, 1)]
    return {name: low_rank(100 + 7 * place, rank, size, fall=fall) for place, name in enumerate(names)}


def one(found: Inference, name: str) -> Change:
    return next(change for change in found.changes if change.tensor == name)


def look(base: Model, merged: Model) -> Inference:
    return infer(base, merged, jobs=1)


# ------------------------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
@pytest.mark.parametrize("size", [0.02, 0.002])
def test_a_merge_has_the_rank_of_its_adapter(dtype: torch.dtype, rank: int, size: float) -> None:
    base = model(dtype)
    fall = 0.9 if dtype is torch.bfloat16 else 0.8  # weaker directions would lie below what bfloat16 keeps
    found = look(base, changed(base, tuned(rank, size, fall=fall)))
    told = [change for change in found.changes if change.kind is not Kind.COPY]
    assert {change.family for change in told} == {"q_proj", "v_proj"}
    if dtype is torch.bfloat16 and size < 0.01 and rank > 8:
        assert all(change.kind is Kind.LOW_RANK and change.rank <= rank for change in told)
        return
    assert [(change.kind, change.rank) for change in told] == [(Kind.LOW_RANK, rank)] * 4
    assert says(found) == f"a LoRA merge of rank {rank} in q_proj and v_proj"
    assert found.exit_code == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_of_a_large_rank_ends_where_it_does(dtype: torch.dtype) -> None:
    """The factors of many ranks hold a good part of the noise too, so what is stored again has less of it."""
    base = {"a.q_proj.weight": weight(5, 400, 500).to(dtype)}
    found = look(base, changed(base, {"a.q_proj.weight": low_rank(6, 64, 0.02, 400, 500, fall=0.98)}))
    assert says(found) == "a LoRA merge of rank 64 in q_proj"
    sunk = low_rank(6, 399, 0.004, 400, 500, fall=0.97)  # as many directions again lie in the noise of bfloat16
    assert not look(base, changed(base, {"a.q_proj.weight": sunk})).is_lora


def test_an_adapter_of_rank_8_whose_factors_have_rank_5_is_one_of_rank_5() -> None:
    base = model(torch.float32)
    b, a = low_rank(1, 5, 1, HIGH, 8), low_rank(2, 8, 1, 8, WIDE)
    delta = b @ a
    found = look(base, changed(base, {Q.format(0): 0.01 * delta / delta.square().mean().sqrt()}))
    assert one(found, Q.format(0)).rank == 5
    assert says(found) == "a LoRA merge of rank 5 in q_proj"


def test_the_ranks_of_two_adapters_add_up() -> None:
    base = model(torch.bfloat16)
    first, second = low_rank(3, 4, 0.02), low_rank(30, 3, 0.01)
    found = look(base, changed(base, {Q.format(0): first + second}))
    assert one(found, Q.format(0)).rank == 7


@pytest.mark.parametrize("merged", [torch.bfloat16, torch.float16], ids=str)
def test_a_merge_into_another_dtype_than_the_base_has(merged: torch.dtype) -> None:
    base = model(torch.float32)
    found = look(base, changed(base, tuned(6, 0.02), merged))
    assert says(found) == "a LoRA merge of rank 6 in q_proj and v_proj"
    cast = {name: tensor.to(merged) for name, tensor in base.items()}
    narrow = look(base, changed(cast, tuned(6, 0.02)))  # loaded in the narrow dtype, and then merged
    assert says(narrow) == says(found)
    wide = {name: tensor.float() for name, tensor in changed(cast, tuned(6, 0.02)).items()}
    assert says(look(cast, wide)) == says(found)  # merged in the narrow dtype, saved in the wide one


def test_a_base_that_was_rounded_after_the_merge() -> None:
    original = model(torch.float32)
    merged = changed(original, tuned(6, 0.02))
    base = {name: tensor.to(torch.bfloat16) for name, tensor in original.items()}
    found = look(base, merged)
    assert [one(found, Q.format(0)).rank, one(found, V.format(1)).rank] == [6, 6]
    assert one(found, HEAD).kind is Kind.COPY  # but for the rounding of BASE


def test_a_faint_change_of_one_direction_shows_no_further_ones() -> None:
    """At this size rounding makes five directions above the floor out of one; a second one that is there is seen."""
    rows = 1024
    base = (0.05 * torch.randn(rows, rows, generator=drawn(5))).bfloat16().double()
    delta = 0.0005 * torch.randn(rows, 1, generator=drawn(6)) @ torch.randn(1, rows, generator=drawn(7))
    found = look({"q.weight": base.bfloat16()}, {"q.weight": (base + delta).bfloat16()})
    assert one(found, "q.weight").rank == 1
    assert "echoes" in one(found, "q.weight").because
    second = low_rank(8, 1, 0.1 * delta.square().mean().sqrt().item(), rows, rows)
    found = look({"q.weight": base.bfloat16()}, {"q.weight": (base + delta + second).bfloat16()})
    assert one(found, "q.weight").rank >= 2


def test_a_rank_above_the_largest_that_is_looked_for_is_not_taken_for_a_full_change_in_silence() -> None:
    side = 1024
    base = {"q_proj.weight": weight(5, side, side)}
    found = look(base, changed(base, {"q_proj.weight": low_rank(6, 300, 0.02, side, side, fall=1.0)}))
    change = one(found, "q_proj.weight")
    assert (change.kind, change.because) == (Kind.FULL, "an adapter of a rank above 256 would look the same")


def test_each_expert_of_a_stack_is_a_matrix() -> None:
    base = {"experts.down_proj": torch.stack([weight(seed) for seed in range(3)]).bfloat16()}
    delta = torch.stack([low_rank(9, 3, 0.02), torch.zeros(HIGH, WIDE, dtype=torch.float64), low_rank(19, 5, 0.02)])
    found = look(base, changed(base, {"experts.down_proj": delta}))
    assert [(change.kind, change.rank) for change in found.changes] == [
        (Kind.LOW_RANK, 3),
        (Kind.COPY, 0),
        (Kind.LOW_RANK, 5),
    ]


# -------------------------------------------------------------------------------------------------------- not LoRA


def test_the_base_itself_is_a_copy() -> None:
    base = model(torch.bfloat16)
    assert says(look(base, dict(base))) == "a copy of BASE"
    assert says(look(model(torch.float32), base)) == "a copy of BASE"  # in another dtype
    moved = dict(base) | {HEAD: base[HEAD].clone()}
    moved[HEAD][7, 7] += 1
    assert says(look(base, moved)) == "1 of 400 rows of lm_head changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.02, 0.002, 0.0003])
def test_a_change_of_full_rank_is_never_of_low_rank(dtype: torch.dtype, size: float) -> None:
    base = model(dtype)
    deltas = {name: size * torch.randn(tensor.shape, generator=drawn(8)) for name, tensor in base.items()}
    found = look(base, changed(base, deltas))
    assert not found.of(Kind.LOW_RANK)
    if size > 0.001 or dtype is torch.float32:
        assert says(found) == "a full fine-tune, not a LoRA merge; biases and norms too"


def test_a_change_of_full_rank_whose_spectrum_falls_fast_is_not_of_low_rank() -> None:
    base = model(torch.bfloat16)
    found = look(base, changed(base, {Q.format(0): low_rank(4, HIGH, 0.02, fall=0.97)}))
    assert not found.of(Kind.LOW_RANK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_noise_alone_is_no_rank(dtype: torch.dtype) -> None:
    """The same float32 model, rounded in two ways."""
    original = model(torch.float32)
    other = torch.bfloat16 if dtype is torch.float16 else torch.float16
    base = {name: tensor.to(dtype) for name, tensor in original.items()}
    merged = {name: tensor.to(other) for name, tensor in original.items()}
    found = look(base, merged)
    assert {change.kind for change in found.changes if len(change.shape) > 1} <= {Kind.FAINT, Kind.COPY}
    added = changed(original, {Q.format(0): low_rank(4, 2, 0.02)}, other)
    assert one(look(base, added), Q.format(0)).rank == 2


def test_a_change_below_what_the_dtype_keeps_is_said_to_be_one() -> None:
    base = model(torch.bfloat16)
    found = look(base, changed(base, tuned(8, 2e-5)))
    assert {change.kind for change in found.changes} == {Kind.COPY, Kind.FAINT}
    assert says(found) == "changed, but too little is left to tell a rank: q_proj and v_proj"
    assert found.exit_code == 3


@pytest.mark.parametrize("axis", [0, 1])
def test_rescaled_rows_or_columns_are_no_merge_of_low_rank(axis: int) -> None:
    base = model(torch.bfloat16)
    tensor = base[Q.format(0)].double()
    factors = torch.rand(tensor.shape[axis], generator=drawn(3), dtype=torch.float64) * 0.2
    delta = tensor * (factors[:, None] if axis == 0 else factors)
    found = look(base, changed(base, {Q.format(0): delta}))
    assert one(found, Q.format(0)).kind is Kind.RESCALED
    assert says(found) == "rows or columns rescaled, as IA3 merges, in q_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_rescaled_beside_a_change_of_low_rank(dtype: torch.dtype) -> None:
    """What DoRA writes: diag(c) (W + s B A)."""
    base = model(dtype)
    c = 1 + 0.1 * torch.randn(HIGH, 1, generator=drawn(3), dtype=torch.float64)
    tensor = base[Q.format(0)].double()
    delta = c * (tensor + low_rank(41, 4, 0.01)) - tensor
    found = look(base, changed(base, {Q.format(0): delta}))
    assert (one(found, Q.format(0)).kind, one(found, Q.format(0)).rank) == (Kind.RESCALED_LOW_RANK, 4)
    assert says(found) == "rows rescaled beside a change of rank 4, as DoRA merges, in q_proj"


def test_vectors_rows_and_whole_matrices_beside_a_merge() -> None:
    base = model(torch.float32)
    norm, bias = {NORM: weight(70, 1, WIDE)[0]}, {"model.norm.bias": weight(71, 1, WIDE)[0]}
    assert says(look(base, changed(base, bias))) == "only biases"
    assert (
        says(look(base, changed(base, tuned(4, 0.01) | norm)))
        == "a LoRA merge of rank 4 in q_proj and v_proj; norms too"
    )
    head = {HEAD: 0.01 * torch.randn(400, WIDE, generator=drawn(72))}
    told = says(look(base, changed(base, tuned(4, 0.01) | head)))
    assert told == "a LoRA merge of rank 4 in q_proj and v_proj; trained in full: lm_head"
    rows = torch.zeros(400, WIDE, dtype=torch.float64)
    rows[:9] = 0.01 * torch.randn(9, WIDE, generator=drawn(73))
    assert says(look(base, changed(base, {EMBEDDING: rows}))) == "9 of 400 rows of embed_tokens changed"


def test_new_rows_in_the_embedding() -> None:
    base = model(torch.bfloat16)
    merged = changed(base, tuned(4, 0.02))
    merged[EMBEDDING] = torch.cat([merged[EMBEDDING], weight(80, 3, WIDE).bfloat16()])
    assert says(look(base, merged)) == "a LoRA merge of rank 4 in q_proj and v_proj; 3 new rows in embed_tokens"


# ------------------------------------------------------------------------------------------- what cannot be looked at


def test_what_cannot_be_told_is_never_told() -> None:
    base = model(torch.float32)
    broken = changed(base, {})
    broken[HEAD][3, 3] = math.nan
    assert one(look(base, broken), HEAD).kind is Kind.UNCLEAR
    assert look(base, broken).exit_code == 3
    counted = base | {"model.steps": torch.arange(6).reshape(2, 3)}
    assert look(counted, counted | {"model.steps": torch.arange(1, 7).reshape(2, 3)}).exit_code == 3
    assert look(counted, dict(counted)).exit_code == 0
    reshaped = base | {HEAD: base[HEAD][:, :-1].contiguous()}
    assert "shape" in one(look(base, reshaped), HEAD).because
    short = {name: tensor for name, tensor in base.items() if name != NORM}
    assert says(look(base, short)) == "1 tensor of BASE missing"
    assert says(look(short, base)) == "1 tensor that BASE lacks"
    with pytest.raises(WrongInputError):
        look({"a.weight": weight(1)}, {"b.weight": weight(1)})
    with pytest.raises(UsageError):
        infer(base, base, jobs=0)


# ------------------------------------------------------------------------------------------------------- the numbers


def test_the_floor_is_above_the_noise_and_not_far() -> None:
    """The norm of a hundred draws, of equal and of very unequal variances."""
    for seed in range(100):
        scale = torch.rand(60, 90, generator=drawn(seed), dtype=torch.float64) ** (seed % 5)
        noise = (torch.rand(60, 90, generator=drawn(1000 + seed), dtype=torch.float64) - 0.5) * scale
        variance = scale.square() / 12
        told = Noise(
            rows=variance.sum(1).max().item(),
            columns=variance.sum(0).max().item(),
            apart=((variance.max().item(), 0.0),),
            total=variance.sum().item(),
            squares=variance.square().sum().item(),
            shape=(60, 90),
        )
        norm = torch.linalg.matrix_norm(noise, 2).item()
        assert norm < told.floor <= told.bound
        assert told.floor < 2.2 * norm
        assert noise.square().sum().item() < told.most
    assert 10 < DEVIATION < 11


def test_a_sketch_finds_the_leading_singular_values() -> None:
    whole = low_rank(1, 12, 1.0) + 0.01 * torch.randn(HIGH, WIDE, generator=drawn(2))

    class Matrix:
        shape, dtype = (HIGH, WIDE), torch.float64

        def spans(self) -> list[slice]:
            return [slice(start, min(start + 50, HIGH)) for start in range(0, HIGH, 50)]

        def tile(self, rows: slice) -> Tensor:
            return whole[rows]

    found, exact = sketch(Matrix(), 20), torch.linalg.svdvals(whole)
    assert torch.allclose(found.values[:12], exact[:12], rtol=1e-6)
    assert bool((found.values <= exact[:20] * (1 + 1e-12)).all())
    product = (found.left * found.values) @ found.right.T
    assert torch.linalg.matrix_norm(whole - product, 2) < 1.2 * exact[20]


def test_the_largest_low_rank_is_the_last_that_saves_numbers() -> None:
    for rows, columns in ((1, 9), (2, 256), (64, 64), (192, 576)):
        rank = largest_low_rank(rows, columns)
        assert rank * (rows + columns) < rows * columns <= (rank + 1) * (rows + columns)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str, Model], str]:
    def save(name: str, tensors: Model) -> str:
        (tmp_path / name).mkdir()
        save_file({key: one.contiguous() for key, one in tensors.items()}, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    return save


def test_the_command(saved: Callable[[str, Model], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = model(torch.bfloat16)
    places = [saved("base", base), saved("merged", changed(base, tuned(4, 0.02)))]
    told = str(tmp_path / "told.json")
    assert main(["infer", *places, "--json", told, "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("a LoRA merge of rank 4 in q_proj and v_proj\n")
    outcome = json.loads(Path(told).read_text())
    assert (outcome["schema"], outcome["command"], outcome["exit_code"]) == (1, "infer", 0)
    line = next(one for one in outcome["tensors"] if one["name"] == Q.format(0))
    assert (line["kind"], line["rank"], line["confidence"]) == ("low-rank", 4, "certain")
    assert sum(line["shares"]) == pytest.approx(1, abs=0.05)
    assert main(["infer", *places, "--format", "json", "--all"]) == 0
    assert json.loads(capsys.readouterr().out)["says"] == outcome["says"]
    assert main(["infer", places[0], places[0]]) == 0
    assert capsys.readouterr().out.startswith("a copy of BASE\n")


def test_markdown_and_a_file_in_the_place_of_stdout(
    saved: Callable[[str, Model], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model(torch.bfloat16)
    places = [saved("base", base), saved("merged", changed(base, tuned(4, 0.02)))]
    assert main(["infer", *places, "--format", "markdown", "--all"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("### a LoRA merge of rank 4 in q\\_proj and v\\_proj\n")
    assert f"| `{Q.format(0)}` | low-rank |" in shown
    file = tmp_path / "told.md"
    assert main(["infer", *places, "--format", "markdown", "--output", str(file)]) == 0
    assert capsys.readouterr().out == ""
    assert file.read_text().startswith(shown.partition("\n")[0])
    assert main(["infer", *places, "--output", places[1] + "/model.safetensors"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_extracted_adapter_is_judged_by_report(
    dtype: torch.dtype, saved: Callable[[str, Model], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verified where float32 kept it; in bfloat16 the rounding of MERGED is in the factors, and infer says so."""
    base = model(dtype)
    deltas = tuned(4, 0.005, (Q,)) | tuned(3, 0.005, (V,))
    places = [saved("base", base), saved("merged", changed(base, deltas))]
    out, told = str(tmp_path / "out"), tmp_path / "told.json"
    assert main(["infer", *places, "--extract", out, "--json", str(told)]) == 0
    text = capsys.readouterr().out
    extracted = json.loads(told.read_text())["extracted"]
    assert (extracted["modules"], extracted["ranks"], extracted["left_out"]) == (4, {"4": 2, "3": 2}, [])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["lora_alpha"] == config["r"]
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, delta in deltas.items():
        b, a = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{one}.weight"].double() for one in "BA")
        assert b.shape[1] == a.shape[0] == (4 if "q_proj" in name else 3)
        assert (b @ a - delta).norm() < (1e-4 if dtype is torch.float32 else 0.05) * delta.norm()
    verdict = main(["report", places[0], out, places[1]])
    assert verdict == (0 if dtype is torch.float32 else 1) == (1 if extracted["over_budget"] else 0)
    assert ("will verify it" if verdict == 0 else "will refute") in text


def test_an_extracted_adapter_of_what_was_no_adapter_is_refuted(
    saved: Callable[[str, Model], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model(torch.float32)
    full = {Q.format(0): 0.01 * torch.randn(HIGH, WIDE, generator=drawn(90))}
    places = [saved("base", base), saved("merged", changed(base, full))]
    assert main(["infer", *places, "--extract", str(tmp_path / "none")]) == 2
    assert [path.name for path in tmp_path.iterdir() if "none" in path.name] == []
    assert "no matrix of MERGED" in capsys.readouterr().err
    assert main(["infer", *places, "--extract", str(tmp_path / "cut"), "--rank", "3"]) == 0
    assert "will refute" in capsys.readouterr().out
    assert main(["report", places[0], str(tmp_path / "cut"), places[1]]) == 1
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    assert main(["infer", *places, "--extract", str(tmp_path / "kept"), "--rank", "3"]) == 2


def test_the_command_refuses_in_one_sentence(
    saved: Callable[[str, Model], str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved("base", model(torch.bfloat16))
    for words in ([base], [base, base, base], [base, base, "--rank", "4"], [base, base + "-nowhere"]):
        assert main(["infer", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "Traceback" not in error
