"""Merges that took a quantised base for the plain one, or the other way round; deltas are a twentieth of the weight.

What was written is made whole, by bitsandbytes itself or by a few lines of torch; nothing here asks for a replay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantised_files as files
import torch
from quantised_files import LINEAR, TARGETS, Model, Tensors
from torch import Tensor

import lora_check
from lora_check.dequantised import decoded
from lora_check.report import Report
from lora_check.types import Verdict

torch.set_num_threads(1)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ASIDE = {"LC204"}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return files.model(tmp_path_factory.mktemp("model"), DTYPES[request.param], size=0.017)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return files.model(tmp_path_factory.mktemp("model"), torch.bfloat16, size=0.017)


def check(made: Model, base: Tensors, merged: Tensors) -> Report:
    return lora_check.check(base, made.adapter, merged, jobs=1)


def named(report: Report) -> dict[str, set[str]]:
    """Code -> tensors, without what is told of their dtypes."""
    return {one.code: set(one.tensors) for one in report.findings if one.code not in ASIDE}


def message(report: Report, code: str) -> str:
    (found,) = [one for one in report.findings if one.code == code]
    return found.message


def evidence(report: Report, code: str) -> dict[str, Any]:
    (found,) = [one for one in report.findings if one.code == code]
    return dict(found.evidence)


def onto(made: Model, names: tuple[str, ...], base: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """The merge in float32 over another base for these weights, stored in the dtype of the model."""
    merged = {name: base[name] for name in names}
    merged |= {name: base[name].float() + delta for name, delta in made.deltas.items()}
    return made.tensors | {name: one.to(dtype or made.tensors[name].dtype) for name, one in merged.items()}


def through(tensors: Tensors, scheme: str, names: tuple[str, ...] = TARGETS) -> Tensors:
    """The same with these weights as bitsandbytes makes them when it quantises and decodes them."""
    if scheme == "int8":
        return files.from_int8(files.in_int8(tensors, names))
    return files.from_4bit(files.in_4bit(tensors, names, scheme))


# ------------------------------------------------------------------------------------------------ the quantisers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 64), (37, 192), (48, 320)])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_a_weight_is_quantised_and_decoded_bit_for_bit_as_bitsandbytes_does(scheme, shape, dtype) -> None:
    weight = (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(5))).to(DTYPES[dtype])
    weight[3] = 0
    wanted = through({"one.weight": weight}, scheme, ("one.weight",))["one.weight"].to(weight.dtype)
    rows = decoded(weight, scheme, weight.dtype)
    assert (rows.shape, rows.dtype) == (shape, weight.dtype)
    assert torch.equal(rows[: shape[0]] + 0, wanted + 0)
    parts = [rows[start : start + 7] for start in range(0, shape[0], 7)]
    assert torch.equal(torch.cat(parts) + 0, wanted + 0)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_blocks_begin_within_rows_and_the_last_may_be_short(scheme) -> None:
    weight = 0.05 * torch.randn((31, 30), generator=torch.Generator().manual_seed(6))
    codes, state = files.functional().quantize_4bit(weight, blocksize=64, quant_type=scheme)
    packed = codes.flatten()
    levels = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten().long()][: weight.numel()]
    wanted = (levels * state.absmax.repeat_interleave(64)[: weight.numel()]).reshape(weight.shape)
    rows = decoded(weight, scheme, torch.float32)
    assert torch.equal(torch.cat([rows[start : start + 4] for start in range(0, 31, 4)]), wanted)


# ------------------------------------------------------------------------------- BASE is float, the merge was not


@pytest.mark.parametrize(("scheme", "code"), [("nf4", "LC155"), ("fp4", "LC155"), ("int8", "LC156")])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_merge_into_the_decoded_base_is_named(made: Model, scheme: str, code: str, everywhere: bool) -> None:
    names = LINEAR if everywhere else TARGETS
    report = check(made, made.tensors, onto(made, names, through(made.tensors, scheme, names)))
    assert named(report) == {code: set(names)}
    assert report.verdict is Verdict.REFUTED
    told = evidence(report, code)
    assert told["scheme"] == scheme
    assert (scheme.upper() if code == "LC155" else "8-bit") in message(report, code)
    if not everywhere:
        q = through(made.tensors, scheme)[told["worst_tensor"]].float() - made.tensors[told["worst_tensor"]].float()
        ratio = (q.norm() / made.deltas[told["worst_tensor"]].norm()).item()
        assert told["error_over_delta"] == pytest.approx(ratio, rel=0.2)  # told of the first rows


@pytest.mark.parametrize("held", ["float32", "float16"])
@pytest.mark.parametrize(("scheme", "code"), [("nf4", "LC155"), ("int8", "LC156")])
def test_the_model_may_have_been_held_in_another_dtype(narrow: Model, scheme: str, code: str, held: str) -> None:
    loaded = {name: one.to(DTYPES[held]) for name, one in narrow.tensors.items()}
    sums = narrow.merged({name: one.to(DTYPES[held]) for name, one in through(loaded, scheme).items()})
    merged = narrow.tensors | {name: sums[name].to(torch.bfloat16) for name in TARGETS}
    assert named(check(narrow, narrow.tensors, merged)) == {code: set(TARGETS)}


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_merge_saved_in_codes_over_the_float_base_is_named_too(narrow: Model, scheme: str) -> None:
    """PEFT decodes, adds and quantises again; BASE is the float model that was loaded."""
    encode = files.in_int8 if scheme == "int8" else lambda x, names: files.in_4bit(x, names, scheme)
    merged = encode(narrow.tensors | narrow.sums(through(narrow.tensors, scheme)), TARGETS)
    assert named(check(narrow, narrow.tensors, merged)) == {"LC156" if scheme == "int8" else "LC155": set(TARGETS)}


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_the_right_merges_are_not_refuted(made: Model, scheme: str) -> None:
    assert named(check(made, made.tensors, made.merged(made.tensors))) == {}
    base = {name: one.to(made.tensors[name].dtype) for name, one in through(made.tensors, scheme).items()}
    assert named(check(made, base, made.merged(base))) == {}


def test_a_decoded_base_without_the_delta_is_another_mistake(made: Model) -> None:
    """Quantised, decoded and not merged: nothing is reproduced, and few levels are what can be told."""
    merged = made.tensors | through(made.tensors, "nf4")
    assert set(named(check(made, made.tensors, merged))) == {"LC160"}


# -------------------------------------------------------------------------------------------- unknown quantisers


def affine(weight: Tensor, group: int, bits: int = 4) -> Tensor:
    """Each group of a row from its least to its largest number in equal steps, in float32."""
    groups = weight.float().reshape(len(weight), -1, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (low + step * torch.round((groups - low) / step)).reshape(weight.shape)


UNKNOWN = {
    "nested": lambda w: files.from_4bit(files.in_4bit({"one": w}, ["one"], "nf4", nested=True))["one"],
    "affine-64": lambda w: affine(w, 64),
    "affine-32": lambda w: affine(w, 32),
    "three-bits": lambda w: affine(w, 64, 3),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_base_of_few_levels_is_recognised(made: Model, kind: str) -> None:
    everywhere = kind == "affine-64"
    names = LINEAR if everywhere else TARGETS
    base = made.tensors | {name: UNKNOWN[kind](made.tensors[name]).to(made.tensors[name].dtype) for name in names}
    report = check(made, made.tensors, onto(made, names, base))
    assert named(report) == {"LC157": set(names)}
    assert evidence(report, "LC157")["block"] == (32 if kind == "affine-32" else 64)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_merge_that_was_rounded_to_few_levels_is_recognised(made: Model, kind: str) -> None:
    everywhere = kind == "affine-64"
    names = LINEAR if everywhere else TARGETS
    whole = onto(made, (), made.tensors)
    merged = whole | {name: UNKNOWN[kind](whole[name]).to(whole[name].dtype) for name in names}
    report = check(made, made.tensors, merged)
    assert named(report) == {"LC160": set(names)}
    told = evidence(report, "LC160")
    assert told["block"] == (32 if kind == "affine-32" else 64)
    if not everywhere:
        name = told["worst_tensor"]
        step = 12**0.5 * (merged[name].float() - whole[name].float()).norm() / made.deltas[name].norm()
        assert told["step_over_delta"] == pytest.approx(step.item(), rel=0.05)


def noisy(made: Model) -> Tensors:
    noise = torch.Generator().manual_seed(8)
    return made.tensors | {
        name: (made.tensors[name].float() + 0.005 * torch.randn(made.tensors[name].shape, generator=noise))
        for name in TARGETS
    }


def test_noise_as_large_as_a_quantisation_error_is_not_taken_for_one(made: Model) -> None:
    assert set(named(check(made, made.tensors, onto(made, TARGETS, noisy(made))))) == {"LC199"}


# ------------------------------------------------------------------------------- BASE is quantised, the merge was not

IN_CODES = {
    "nf4": lambda x: files.in_4bit(x, LINEAR),
    "fp4": lambda x: files.in_4bit(x, LINEAR, "fp4"),
    "nf4-nested": lambda x: files.in_4bit(x, LINEAR, nested=True),
    "int8": lambda x: files.in_int8(x, LINEAR),
    "fp8": lambda x: files.in_fp8(x, LINEAR),
}


@pytest.mark.parametrize("scheme", IN_CODES)
def test_a_merge_into_the_original_of_a_quantised_base_is_recognised(made: Model, scheme: str) -> None:
    report = check(made, IN_CODES[scheme](made.tensors), made.merged(made.tensors))
    assert named(report) == {"LC158": set(LINEAR)}
    assert scheme.split("-")[0].replace("fp8", "float8_e4m3fn") in message(report, "LC158")


NEAR = {"nf4": 0.01, "int8": 0.001, "fp8": 0.005}


@pytest.mark.parametrize("scheme", NEAR)
def test_another_base_near_the_quantised_one_is_not_its_original(narrow: Model, scheme: str) -> None:
    """Far smaller than a step, the disturbance stays in every cell; it has not the energy of a quantisation error."""
    base = IN_CODES[scheme](narrow.tensors)
    decode = {"nf4": files.from_4bit, "int8": files.from_int8, "fp8": files.from_fp8}[scheme]
    noise = torch.Generator().manual_seed(9)
    changed = {name: decode(base)[name].float() for name in TARGETS}
    changed = {
        name: one * (1 + NEAR[scheme] * torch.randn(one.shape, generator=noise)) for name, one in changed.items()
    }
    merged = narrow.merged(narrow.tensors | decode(base) | changed)
    assert set(named(check(narrow, base, merged))) == {"LC199"}


# --------------------------------------------------------------------------------------------- codes and scales


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_codes_taken_for_numbers_are_named(made: Model, scheme: str, merges: bool) -> None:
    base = IN_CODES[scheme](made.tensors)
    dtype = made.tensors[TARGETS[0]].dtype
    raw = made.tensors | {name: base[name].float() for name in LINEAR}
    raw |= {name: raw[name] + delta for name, delta in made.deltas.items()} if merges else {}
    report = check(made, base, {name: one.to(dtype) for name, one in raw.items()})
    # the smallest deltas vanish beside codes that are hundreds of times as large
    assert named(report) == {"LC159": set(LINEAR)}
    assert ("delta added" in message(report, "LC159")) == merges or dtype == torch.bfloat16
    assert evidence(report, "LC159")["codes"] == ("int8" if scheme == "int8" else "float8_e4m3fn")


def test_codes_that_were_copied_without_their_scales_are_told(narrow: Model) -> None:
    base = IN_CODES["fp8"](narrow.tensors)
    bare = {name: one for name, one in base.items() if not name.endswith("_scale_inv")}
    report = check(narrow, base, bare)
    assert named(report)["LC161"] == set(LINEAR)
    assert report.verdict is not Verdict.VERIFIED
    assert "LC161" not in named(check(narrow, base, dict(base)))
    assert "LC161" not in named(check(narrow, base, narrow.merged(narrow.tensors)))


LEFT = {"fp8": ("_scale_inv",), "int8": ("SCB", "_format"), "nf4": (".absmax", ".quant_map")}


@pytest.mark.parametrize("scheme", LEFT)
def test_what_is_left_of_a_quantisation_beside_numbers_is_told(narrow: Model, scheme: str) -> None:
    base = IN_CODES[scheme](narrow.tensors)
    decode = {"nf4": files.from_4bit, "int8": files.from_int8, "fp8": files.from_fp8}[scheme]
    merged = {name: one.to(torch.bfloat16) for name, one in narrow.sums(decode(base)).items()}
    assert "LC314" not in named(check(narrow, base, merged))
    left = {name: one for name, one in base.items() if name not in merged and name.endswith(LEFT[scheme])}
    assert len(left) == len(LINEAR) * len(LEFT[scheme])
    report = check(narrow, base, merged | left)
    assert named(report)["LC314"] == set(left)
    assert f"beside the numbers of {len(LINEAR)} weights" in message(report, "LC314")
    assert report.verdict is Verdict.REFUTED


def test_an_extra_tensor_of_another_kind_is_not_called_a_scale(narrow: Model) -> None:
    merged = narrow.merged(narrow.tensors)
    for name in ("model.layers.0.self_attn.q_proj.weights", "model.scales", "other.weight_scale_inv"):
        assert "LC314" not in named(check(narrow, narrow.tensors, merged | {name: torch.ones(3)}))


# ------------------------------------------------------------------------------------------ containers and steps


@pytest.mark.parametrize("scheme", ["GPTQ", "AWQ", "MLX", "HQQ"])
def test_a_container_that_nothing_is_merged_into_is_told_where_both_sides_have_it(narrow: Model, scheme: str) -> None:
    coded = {name: one for name, one in narrow.tensors.items() if name not in TARGETS}
    for name in TARGETS:
        coded |= files.packed(name, tuple(narrow.tensors[name].shape), scheme)
    report = check(narrow, coded, dict(coded))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert ("LC313" in named(report)) == (scheme in ("GPTQ", "AWQ"))
    if scheme in ("GPTQ", "AWQ"):
        assert message(report, "LC313").startswith(f"all 2 targets still lie in {scheme}, as in BASE")
    for base, merged in ((coded, narrow.merged(narrow.tensors)), (narrow.tensors, coded)):
        assert "LC313" not in named(check(narrow, base, merged))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("size", [0.008, 0.08])
def test_a_merge_whose_step_swallows_the_delta_is_told(tmp_path: Path, size: float, again: bool) -> None:
    made = files.model(tmp_path, size=size)
    base = files.in_4bit(made.tensors, LINEAR)
    merged = files.in_4bit({name: made.sums(files.from_4bit(base))[name].bfloat16() for name in TARGETS}, TARGETS)
    coded = base | merged
    if again:
        coded = {name: one.to(torch.bfloat16) for name, one in files.from_4bit(coded).items()}
    report = check(made, base, coded)
    assert report.verdict is not Verdict.REFUTED
    assert set(named(report)) - {"LC302"} == ({"LC312"} if size < 0.05 else set())
    if size < 0.05:
        told = evidence(report, "LC312")
        error = [(files.from_4bit(base | merged)[n].float() - made.sums(files.from_4bit(base))[n]) for n in TARGETS]
        ratio = 12**0.5 * sum(one.square().sum() for one in error) ** 0.5
        ratio /= sum(one.square().sum() for one in made.deltas.values()) ** 0.5
        assert told["step_over_delta"] == pytest.approx(float(ratio), rel=0.02)
        assert told["snr_db"] < 0


def test_a_base_that_is_itself_of_few_levels_says_nothing(narrow: Model) -> None:
    """BASE is a decoded 4-bit model, MERGED another one rounded in another way: no grid can tell which was meant."""
    base = narrow.tensors | {name: affine(narrow.tensors[name], 64).bfloat16() for name in LINEAR}
    assert named(check(narrow, base, narrow.merged(base))) == {}
    other = onto(narrow, TARGETS, {name: affine(base[name] * 1.1, 32) for name in TARGETS})
    assert not {"LC157", "LC160"} & set(named(check(narrow, base, base | {name: other[name] for name in TARGETS})))
