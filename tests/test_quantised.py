"""Quantised bases and merges: decoded as their libraries do, compared code by code, never verified where not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised_files as files
import torch
from quantised_files import LAYER, LINEAR, TARGETS, Model, Tensors
from torch import Tensor

import lora_check
from lora_check import Verdict
from lora_check.errors import CorruptCheckpointError
from lora_check.locations import open_checkpoint
from lora_check.quantised import Decoded, decoded
from lora_check.report import Report

CONFIG = {"model_type": "llama", "tie_word_embeddings": False}
QUERY, KEY, OUT, UP = LINEAR
SCHEMES: dict[str, tuple[Callable[..., Tensors], Callable[[Tensors], Tensors]]] = {
    "nf4": (lambda tensors, names: files.in_4bit(tensors, names), files.from_4bit),
    "nf4-nested": (lambda tensors, names: files.in_4bit(tensors, names, nested=True), files.from_4bit),
    "fp4": (lambda tensors, names: files.in_4bit(tensors, names, "fp4"), files.from_4bit),
    "int8": (lambda tensors, names: files.in_int8(tensors, names), files.from_int8),
}
"""Scheme -> how bitsandbytes quantises the named weights, and how it decodes all."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return files.model(tmp_path_factory.mktemp("quantised"))


def check(made: Model, base: Tensors, merged: Tensors, **options: Any) -> Report:
    return lora_check.check(base, made.adapter, merged, jobs=1, **options)


def verdicts(report: Report) -> dict[str, str]:
    return {one.tensor: one.verdict.value for one in report.comparisons}


def refuted(report: Report) -> set[str]:
    return {name for name, word in verdicts(report).items() if word == "refuted"}


def found(report: Report) -> set[str]:
    return {one.code for one in report.findings}


def over(report: Report, name: str) -> int:
    return next(one.over_budget for one in report.comparisons if one.tensor == name)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


# --------------------------------------------------------------------------------------------------- decoding


def seen(tensors: Tensors) -> Decoded:
    """The tensors as a base is seen."""
    checkpoint, _ = decoded(
        open_checkpoint(tensors, role="base"), open_checkpoint({"x": torch.zeros(1)}, role="merged")
    )
    assert isinstance(checkpoint, Decoded)
    return checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_decoded_bit_for_bit_as_bitsandbytes_decodes_it(made: Model, scheme: str, dtype) -> None:
    encode, decode = SCHEMES[scheme]
    coded = encode({name: tensor.to(dtype) for name, tensor in made.tensors.items()}, LINEAR)
    checkpoint, expected = seen(coded), decode(coded)
    assert list(checkpoint.metas()) == list(made.tensors)
    for name, tensor in expected.items():
        assert same(checkpoint.read(name), tensor), name
        meta = checkpoint.metas()[name]
        assert (meta.shape, f"torch.{meta.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert bool(meta.codes) == (name in LINEAR)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_may_lie_in_elements_of_a_wider_dtype(made: Model, storage) -> None:
    coded = files.in_4bit(made.tensors, [QUERY])
    packed = coded | {QUERY: coded[QUERY].flatten().view(storage).unsqueeze(1)}
    assert same(seen(packed).read(QUERY), files.from_4bit(coded)[QUERY])


def test_blocks_go_on_over_the_ends_of_rows_and_the_last_may_be_short() -> None:
    weight = torch.randn(7, 27, generator=torch.Generator().manual_seed(3))
    coded = files.in_4bit({"x.weight": weight}, ["x.weight"])
    scales = coded["x.weight.absmax"].repeat_interleave(64)[: weight.numel()].reshape(weight.shape)
    assert torch.equal(scales.flatten()[128:], weight.flatten()[128:].abs().max().expand(61))
    level = seen(coded).read("x.weight") / scales
    nearest = (coded["x.weight.quant_map"] - (weight / scales)[..., None]).abs().amin(-1)
    assert torch.allclose((level - weight / scales).abs(), nearest, atol=1e-6)


BROKEN: dict[str, Callable[[Tensors], Tensors]] = {
    "no header at all": lambda coded: coded | {f"{QUERY}.quant_state.bitsandbytes__nf4": _text("[1, 2")},
    "a header of another kind": lambda coded: coded | {f"{QUERY}.quant_state.bitsandbytes__nf4": _text("[]")},
    "a shape of no size": lambda coded: _said(coded, shape=[]),
    "another shape": lambda coded: _said(coded, shape=[192, 64]),
    "a block of no size": lambda coded: _said(coded, blocksize=0),
    "an odd dtype": lambda coded: _said(coded, dtype="int8"),
    "nested and no offset": lambda coded: _said(coded, nested_blocksize=256),
    "no absmax": lambda coded: {name: one for name, one in coded.items() if name != f"{QUERY}.absmax"},
    "a short absmax": lambda coded: coded | {f"{QUERY}.absmax": coded[f"{QUERY}.absmax"][1:]},
    "short codes": lambda coded: coded | {QUERY: coded[QUERY][1:]},
    "other levels": lambda coded: files.changed(coded, f"{QUERY}.quant_map", 3, lambda x: x + 1e-3),
}


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _said(coded: Tensors, **changes: Any) -> Tensors:
    header = f"{QUERY}.quant_state.bitsandbytes__nf4"
    return coded | {header: _text(json.dumps(json.loads(bytes(coded[header].tolist())) | changes))}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("side", ["base", "merged"])
def test_a_header_that_contradicts_its_tensors_is_refused_in_a_sentence(made: Model, case: str, side: str) -> None:
    whole = files.in_4bit(made.tensors, LINEAR)
    broken = {"base": whole, "merged": files.in_4bit(made.sums(files.from_4bit(whole)), LINEAR)}
    broken[side] = BROKEN[case](broken[side])
    with pytest.raises(CorruptCheckpointError, match=rf"^{side}: .*self_attn\.q_proj\.weight") as refusal:
        check(made, broken["base"], broken["merged"])
    assert refusal.value.hint


# ------------------------------------------------------------------------------------- merges made by the formula


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_onto_the_decoded_base_is_verified(made: Model, scheme: str) -> None:
    encode, decode = SCHEMES[scheme]
    base = encode(made.tensors, LINEAR)
    for dtype in (torch.bfloat16, torch.float32):
        report = check(made, base, made.merged({name: one.to(dtype) for name, one in decode(base).items()}))
        assert report.verdict is Verdict.VERIFIED, report.findings
        assert found(report) <= {"LC204"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_quantised_again_is_verified_code_by_code(made: Model, scheme: str) -> None:
    encode, decode = SCHEMES[scheme]
    base = encode(made.tensors, LINEAR)
    merged = base | {
        name: one for name, one in encode(made.sums(decode(base)), TARGETS).items() if name.startswith(TARGETS_ALIKE)
    }
    report = check(made, base, merged)
    survivals = [one.survival for one in report.comparisons if one.kind == "target"]
    assert (report.verdict, found(report)) == (Verdict.VERIFIED, {"LC312"} if min(survivals) < 0.5 else set())
    assert all(one.exact for one in report.comparisons)
    assert min(survivals) > 0.1


TARGETS_ALIKE = tuple(name.removesuffix("weight") for name in TARGETS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_quantised_and_decoded_again_is_verified_and_said_to_be_one(made: Model, scheme: str) -> None:
    encode, decode = SCHEMES[scheme]
    base = encode(made.tensors, LINEAR)
    again = decode(encode(made.sums(decode(base)), TARGETS))
    merged = {name: one.to(torch.bfloat16) for name, one in (decode(base) | {t: again[t] for t in TARGETS}).items()}
    report = check(made, base, merged)
    assert report.verdict is Verdict.VERIFIED, report.findings
    for one in report.comparisons:
        assert (one.arithmetic or "").endswith("quantised-again") == (one.kind == "target")
    step = files.changed(merged, KEY, 77, lambda x: x * 1.02)
    assert refuted(check(made, base, step)) == {KEY}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float_base_may_have_been_merged_and_then_quantised(made: Model, scheme: str) -> None:
    encode, _ = SCHEMES[scheme]
    report = check(made, made.tensors, encode(made.merged(made.tensors), LINEAR))
    assert report.verdict is Verdict.VERIFIED, report.findings
    assert check(made, made.tensors, encode(made.tensors, LINEAR)).verdict is Verdict.REFUTED


def test_one_scheme_may_have_been_merged_into_another(made: Model) -> None:
    base = files.in_4bit(made.tensors, LINEAR, nested=True)
    merged = files.in_int8(made.sums(files.from_4bit(base)), LINEAR)
    report = check(made, base, merged)
    assert report.verdict is Verdict.VERIFIED, report.findings


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_base_that_was_given_is_the_one_that_counts(made: Model, scheme: str) -> None:
    """A merge onto the 16-bit weights is no merge onto the quantised ones, and the other way round."""
    encode, decode = SCHEMES[scheme]
    base = encode(made.tensors, LINEAR)
    onto_float = made.merged(made.tensors)
    onto_codes = {name: one.to(torch.bfloat16) for name, one in made.merged(decode(base)).items()}
    assert check(made, made.tensors, onto_float).verdict is Verdict.VERIFIED
    assert set(TARGETS) <= refuted(check(made, made.tensors, onto_codes))
    assert set(TARGETS) <= refuted(check(made, base, onto_float))
    requantised = encode(made.sums(decode(base)), LINEAR)
    assert set(TARGETS) <= refuted(check(made, made.tensors, requantised))


# ---------------------------------------------------------------------------------------------- negative controls


@pytest.fixture(scope="module")
def requantised(made: Model) -> Callable[[str], tuple[Tensors, Tensors]]:
    """Scheme -> a base and an honest merge into its codes."""

    def get(scheme: str) -> tuple[Tensors, Tensors]:
        encode, decode = SCHEMES[scheme]
        base = encode(made.tensors, LINEAR)
        sums = encode(made.sums(decode(base)), TARGETS)
        return base, base | {name: one for name, one in sums.items() if name.startswith(TARGETS_ALIKE)}

    return get


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("place", [0, 1000, -1])
def test_one_code_changed_by_one_step_is_one_element_over_budget(made, requantised, scheme: str, place: int) -> None:
    base, merged = requantised(scheme)
    stepped = files.changed(merged, QUERY, place, lambda x: x - 1 if int(x) & 15 else x + 1)
    report = check(made, base, stepped)
    assert (refuted(report), over(report, QUERY)) == ({QUERY}, 1)


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("times", [0.995, 1.005])
def test_a_scale_that_is_off_is_wrong_for_its_whole_block(made, requantised, scheme, times: float) -> None:
    base, merged = requantised(scheme)
    scales, block = (f"{QUERY}.absmax", 64) if scheme != "int8" else (f"{QUERY.removesuffix('weight')}SCB", 64)
    away = files.changed(merged, scales, 5, lambda x: x * times)
    report = check(made, base, away)
    assert (refuted(report), over(report, QUERY)) == ({QUERY}, block)


def test_every_part_of_a_nested_scale_is_judged(made, requantised) -> None:
    base, merged = requantised("nf4-nested")
    changes = {
        "code": (64, files.changed(merged, f"{QUERY}.absmax", 9, lambda x: x + 1)),
        "group": (256 * 64, files.changed(merged, f"{QUERY}.nested_absmax", 0, lambda x: x * 1.001)),
        "mean": (264 * 64, _with_offset(merged, QUERY, 1.001)),
    }
    for what, (elements, broken) in changes.items():
        report = check(made, base, broken)
        assert (refuted(report), over(report, QUERY)) == ({QUERY}, elements), what
    assert refuted(check(made, base, _with_offset(merged, UP, 1 + 2**-22))) == {UP}


def test_scales_nested_around_another_number_than_their_mean_are_not_those_of_bitsandbytes(made, requantised) -> None:
    base, merged = requantised("nf4-nested")
    maxima = files.in_4bit(made.sums(files.from_4bit(base)), [QUERY])[f"{QUERY}.absmax"]
    for times, word in ((1.0, "verified"), (1.02, "refuted")):
        header = f"{QUERY}.quant_state.bitsandbytes__nf4"
        offset = torch.tensor(json.loads(bytes(merged[header].tolist()))["nested_offset"] * times)
        codes, state = files.functional().quantize_blockwise(maxima - offset, blocksize=256)
        nested = {f"{QUERY}.absmax": codes, f"{QUERY}.nested_absmax": state.absmax}
        assert verdicts(check(made, base, _with_offset(merged, QUERY, times) | nested))[QUERY] == word


def _with_offset(merged: Tensors, name: str, times: float) -> Tensors:
    header = f"{name}.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(merged[header].tolist()))
    return merged | {header: _text(json.dumps(said | {"nested_offset": said["nested_offset"] * times}))}


MISTAKES = (("LC101", 0.0), ("LC110", 1.7), ("LC102", 2.0), ("LC103", -1.0), ("LC111", files.R / files.ALPHA))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mistakes_in_codes_are_named(made: Model, scheme: str) -> None:
    encode, decode = SCHEMES[scheme]
    base = encode(made.tensors, LINEAR)
    plain = decode(base)
    for code, times in MISTAKES if scheme == "nf4" else MISTAKES[:2]:
        wrong = plain | {name: plain[name].float() + times * delta for name, delta in made.deltas.items()}
        merged = base | {n: one for n, one in encode(wrong, TARGETS).items() if n.startswith(TARGETS_ALIKE) and times}
        report = check(made, base, merged)
        assert (found(report), refuted(report)) == ({code}, set(TARGETS)), code


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_bystander_is_compared_by_its_bytes(made: Model, scheme: str, requantised) -> None:
    base, merged = requantised(scheme)
    scales = f"{UP}.absmax" if scheme != "int8" else f"{UP.removesuffix('weight')}SCB"
    parts = {"codes": UP, "scales": scales} | ({"groups": f"{UP}.nested_absmax"} if scheme == "nf4-nested" else {})
    for what, name in parts.items():
        change = (lambda x: x ^ 1) if not merged[name].is_floating_point() else (lambda x: x * (1 + 2**-23))
        report = check(made, base, files.changed(merged, name, 1, change))
        assert (refuted(report), found(report) - {"LC312"}) == ({UP}, {"LC401"}), what


def test_a_header_is_compared_by_what_it_says_and_not_by_its_letters(made: Model, requantised) -> None:
    base, merged = requantised("nf4")
    header = f"{UP}.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(merged[header].tolist()))
    spaced = merged | {header: _text(json.dumps(said, indent=1, sort_keys=True))}
    assert check(made, base, spaced).verdict is Verdict.VERIFIED


def test_a_bystander_that_was_decoded_and_quantised_once_more_is_honest(made: Model) -> None:
    base = files.in_4bit(made.tensors, LINEAR, nested=True)
    merged = files.in_4bit(made.sums(files.from_4bit(base)), LINEAR, nested=True)
    assert not torch.equal(base[f"{UP}.nested_absmax"], merged[f"{UP}.nested_absmax"])
    assert check(made, base, merged).verdict is Verdict.VERIFIED


def test_scales_that_are_not_read_do_not_help(made: Model) -> None:
    """The codes as numbers, or the codes with their scales cut off, are no merge."""
    base = files.in_fp8(made.tensors, LINEAR)
    raw = {name: base[name].to(torch.bfloat16) for name in made.tensors}
    assert set(LINEAR) <= refuted(check(made, base, made.merged(raw)))
    bare = {name: base[name] for name in made.tensors}
    report = check(made, base, bare)
    assert report.verdict is not Verdict.VERIFIED
    assert {verdicts(report)[name] for name in LINEAR} <= {"inconclusive", "refuted"}


def test_several_adapters_in_codes_are_not_decided(made: Model, requantised) -> None:
    base, merged = requantised("nf4")
    report = lora_check.check(base, [made.adapter, made.adapter], merged, jobs=1)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert {verdicts(report)[name] for name in TARGETS} == {"inconclusive"}


def test_a_delta_that_the_codes_cannot_show_proves_nothing(made: Model, tmp_path: Path) -> None:
    faint = files.model(tmp_path, size=1e-5)
    base = files.in_int8(faint.tensors, LINEAR)
    merged = files.in_int8(faint.sums(files.from_int8(base)), TARGETS)
    report = check(faint, base, base | {n: one for n, one in merged.items() if n.startswith(TARGETS_ALIKE)})
    assert all(torch.equal(merged[name], base[name]) for name in TARGETS)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "LC302" in found(report)


# -------------------------------------------------------------------------------------------------- live producers


@pytest.mark.parametrize("scheme", ["nf4-nested", "int8"])
def test_what_transformers_quantises_and_peft_merges_is_verified(tmp_path: Path, scheme: str) -> None:
    base, adapter, merged = files.live(tmp_path, scheme)
    report = lora_check.check(base, adapter, merged, jobs=1)
    assert (report.verdict, found(report)) == (Verdict.VERIFIED, set())
    assert sum(one.kind == "target" for one in report.comparisons) == 2
    assert sum(one.dtype.startswith("bitsandbytes") for one in report.comparisons) == 7
    _, decode = SCHEMES[scheme]
    again = {name: one.to(torch.bfloat16) for name, one in decode(merged).items()}
    report = lora_check.check(base, adapter, again, jobs=1)
    assert (report.verdict, found(report)) == (Verdict.VERIFIED, {"LC204"})


def test_a_bias_that_peft_adds_unscaled_to_quantised_layers_is_not_verified(tmp_path: Path) -> None:
    base, adapter, merged = files.live(tmp_path, "nf4-nested", lora_bias=True)
    report = lora_check.check(base, adapter, merged, jobs=1)
    biases = {f"{LAYER}.self_attn.q_proj.bias", f"{LAYER}.self_attn.k_proj.bias"}
    assert (report.verdict, refuted(report)) == (Verdict.REFUTED, biases)
    assert found(report) & {"LC111", "LC114"}
