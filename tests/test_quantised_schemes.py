"""fp8 with scales, MXFP4, GGUF, and codes that nobody here decodes: what is told of each, and what never is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantised_files as files
import torch
from quantised_files import LAYER, LINEAR, TARGETS, Model, Tensors
from safetensors.torch import load_file
from torch import Tensor

import lora_check
from lora_check import Verdict
from lora_check.report import Report

QUERY, KEY, OUT, UP = LINEAR
ALIKE = tuple(name.removesuffix("weight") for name in TARGETS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return files.model(tmp_path_factory.mktemp("schemes"))


def check(made: Model, base: Any, merged: Any, **options: Any) -> Report:
    return lora_check.check(base, made.adapter, merged, jobs=1, **options)


def verdicts(report: Report) -> dict[str, str]:
    return {one.tensor: one.verdict.value for one in report.comparisons}


def refuted(report: Report) -> set[str]:
    return {name for name, word in verdicts(report).items() if word == "refuted"}


def found(report: Report) -> set[str]:
    return {one.code for one in report.findings}


def over(report: Report, name: str) -> int:
    return next(one.over_budget for one in report.comparisons if one.tensor == name)


def as_bf16(tensors: Tensors) -> Tensors:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def onto(base: Tensors, sums: Tensors) -> Tensors:
    """The base's file with the targets, and what lies beside them, taken from another."""
    return base | {name: one for name, one in sums.items() if name.startswith(ALIKE)}


# --------------------------------------------------------------------------------------------------------- fp8

WHOLE = (10**6, 10**6)
BLOCKS = {
    "blocks of 128": ((128, 128), "_scale_inv", torch.float32),
    "one a row": ((1, 128), "_scale", torch.float32),
    "one a tensor": (WHOLE, "_scale", torch.float32),
    "one a row, in bf16": ((1, 128), "_scale", torch.bfloat16),
}


@pytest.fixture(params=BLOCKS)
def fp8(request: pytest.FixtureRequest) -> dict[str, Any]:
    block, end, dtype = BLOCKS[request.param]
    return {"block": block, "end": end, "dtype": dtype}


def decoded(coded: Tensors, fp8: dict[str, Any]) -> Tensors:
    plain = files.from_fp8(coded, fp8["block"], fp8["end"])
    return {name: one.to(torch.bfloat16) if fp8["dtype"] == torch.bfloat16 else one for name, one in plain.items()}


def test_fp8_is_decoded_and_the_merge_onto_it_verified(made: Model, fp8: dict[str, Any]) -> None:
    base = files.in_fp8(made.tensors, LINEAR, **fp8)
    assert base[QUERY].dtype == torch.float8_e4m3fn
    plain = decoded(base, fp8)
    merged = as_bf16(made.merged(plain))
    report = check(made, base, merged)
    assert (report.verdict, found(report)) == (Verdict.VERIFIED, {"LC204"})
    assert set(LINEAR) <= refuted(check(made, made.tensors, merged))
    assert refuted(check(made, base, made.merged(made.tensors))) == set(LINEAR)


def test_fp8_merged_again_is_verified_code_by_code(made: Model, fp8: dict[str, Any]) -> None:
    base = files.in_fp8(made.tensors, LINEAR, **fp8)
    sums = made.sums(decoded(base, fp8))
    merged = onto(base, files.in_fp8(sums, TARGETS, **fp8))
    assert check(made, base, merged).verdict is Verdict.VERIFIED
    assert check(made, base, onto(base, files.in_fp8(as_bf16(sums), TARGETS, **fp8))).verdict is Verdict.VERIFIED
    stepped = files.changed(merged | {QUERY: merged[QUERY].view(torch.uint8)}, QUERY, 900, lambda x: x ^ 1)
    report = check(made, base, stepped | {QUERY: stepped[QUERY].view(torch.float8_e4m3fn)})
    assert (refuted(report), over(report, QUERY)) == ({QUERY}, 1)
    twice = {name: plain + made.deltas[name] for name, plain in sums.items() if name in TARGETS}
    report = check(made, base, onto(base, files.in_fp8(sums | twice, TARGETS, **fp8)))
    assert (refuted(report), found(report)) == (set(TARGETS), {"LC102"})


def test_a_merge_into_fp8_that_was_decoded_again_is_verified(made: Model, fp8: dict[str, Any]) -> None:
    base = files.in_fp8(made.tensors, LINEAR, **fp8)
    again = decoded(files.in_fp8(made.sums(decoded(base, fp8)), TARGETS, **fp8), fp8)
    merged = as_bf16(decoded(base, fp8) | {name: again[name] for name in TARGETS})
    report = check(made, base, merged)
    assert report.verdict is Verdict.VERIFIED
    assert all((one.arithmetic or "").endswith("again") == (one.kind == "target") for one in report.comparisons)
    assert refuted(check(made, base, files.changed(merged, KEY, 77, lambda x: x * 1.05))) == {KEY}


def test_fp8_may_be_merged_with_powers_of_two_or_with_the_scales_of_the_base(made: Model) -> None:
    base = files.in_fp8(made.tensors, LINEAR)
    sums = made.sums(files.from_fp8(base))
    power = files.in_fp8(sums, TARGETS, rule="power")
    assert check(made, base, onto(base, power)).verdict is Verdict.VERIFIED
    doubled = base | {f"{name}_scale_inv": 2 * base[f"{name}_scale_inv"] for name in TARGETS}
    doubled |= {name: (base[name].float() / 2).to(torch.float8_e4m3fn) for name in TARGETS}
    sums = made.sums(files.from_fp8(doubled))
    reused = files.in_fp8(sums, TARGETS, scales=doubled)
    assert check(made, doubled, onto(doubled, reused)).verdict is Verdict.VERIFIED


def test_scales_of_no_known_rule_prove_nothing(made: Model) -> None:
    base = files.in_fp8(made.tensors, LINEAR)
    sums = made.sums(files.from_fp8(base))
    report = check(made, base, onto(base, files.in_fp8(sums, TARGETS, rule="odd")))
    assert (report.verdict, found(report)) == (Verdict.INCONCLUSIVE, {"LC311"})
    giant = {f"{name}_scale_inv": torch.full_like(base[f"{name}_scale_inv"], 1e30) for name in TARGETS}
    nothing = {name: torch.zeros_like(base[name]) for name in TARGETS}
    assert check(made, base, base | giant | nothing).verdict is Verdict.INCONCLUSIVE


def test_a_saturated_code_is_over_budget(made: Model) -> None:
    base = files.in_fp8(made.tensors, LINEAR)
    sums = made.sums(files.from_fp8(base))
    tight = {name: one / 8 for name, one in base.items() if name.endswith("_scale_inv")}
    report = check(made, base, onto(base, files.in_fp8(sums, TARGETS, scales=tight)))
    assert refuted(report) == set(TARGETS)


def test_scales_of_one_byte_are_powers_of_two(made: Model) -> None:
    base = files.in_fp8(made.tensors, LINEAR, rule="power")
    plain = files.from_fp8(base)
    for kind in (torch.float8_e8m0fnu, torch.uint8):
        bytes_ = {
            name: one.to(torch.float8_e8m0fnu) if kind != torch.uint8 else (one.log2() + 127).to(torch.uint8)
            for name, one in base.items()
            if name.endswith("_scale_inv")
        }
        assert check(made, base | bytes_, as_bf16(made.merged(plain))).verdict is Verdict.VERIFIED


def test_an_input_scale_goes_with_the_codes_and_no_further(made: Model) -> None:
    rider = {f"{name.removesuffix('weight')}input_scale": torch.tensor(0.5) for name in LINEAR}
    plain = files.in_fp8(made.tensors, LINEAR)
    base = plain | rider
    floats = as_bf16(made.merged(files.from_fp8(plain)))
    assert check(made, base, floats).verdict is Verdict.VERIFIED
    kept = {name: 2 * one for name, one in rider.items()}
    assert refuted(check(made, base, floats | kept)) == set(kept)
    merged = onto(base, files.in_fp8(made.sums(files.from_fp8(plain)), TARGETS))
    report = check(made, base, merged)
    assert report.verdict is Verdict.VERIFIED
    assert set(rider) <= set(verdicts(report))
    name = next(iter(rider))
    assert refuted(check(made, base, merged | {name: torch.tensor(0.25)})) == {name}
    assert "LC201" in found(check(made, base, {key: one for key, one in merged.items() if key != name}))


def test_scales_that_do_not_divide_the_weight_are_not_guessed(made: Model) -> None:
    base = files.in_fp8(made.tensors, LINEAR)
    odd = base | {f"{QUERY}_scale_inv": torch.ones(7, 5)}
    report = check(made, odd, as_bf16(made.merged(files.from_fp8(base))))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert verdicts(report)[QUERY] == "inconclusive"
    assert found(report) == {"LC204", "LC303"}


def test_the_configuration_says_how_large_a_block_is(made: Model, tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [96, 48]}}
    coded = files.in_fp8(made.tensors, LINEAR, (96, 48))
    base = files.write(tmp_path / "base", coded, said)
    merged = as_bf16(made.merged(files.from_fp8(coded, (96, 48))))
    assert check(made, base, merged).verdict is Verdict.VERIFIED
    assert check(made, coded, merged).verdict is not Verdict.VERIFIED


# ------------------------------------------------------------------------------------------------------- mxfp4

EXPERTS, INNER, INTERMEDIATE = 3, 64, 96


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Tensors, Path, Tensor]:
    """A base with experts in MXFP4, the same decoded, an adapter on them, and its delta."""
    folder = tmp_path_factory.mktemp("experts")
    name = f"{LAYER}.mlp.experts.gate_up_proj"
    parts = files.in_mxfp4(EXPERTS, INNER, 2 * INTERMEDIATE)
    rest = {"model.embed_tokens.weight": torch.randn(20, INNER, generator=torch.Generator().manual_seed(1))}
    base = rest | {f"{name}_{role}": part for role, part in parts.items()}
    random = torch.Generator().manual_seed(2)
    a, b = (0.05 * torch.randn(size, generator=random) for size in ((2 * EXPERTS, INNER), (192, 2 * EXPERTS)))
    module = "base_model.model.model.layers.0.mlp.experts"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": [], "peft_version": "0.21.2"}
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    adapter = files.write(
        folder / "adapter", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, config, "adapter"
    )
    delta = 2.5 * torch.einsum("ore,eri->eio", b.reshape(192, 2, EXPERTS), a.reshape(EXPERTS, 2, INNER))
    return base, rest | {name: files.from_mxfp4(parts)}, adapter, delta


def test_mxfp4_is_decoded_as_transformers_decodes_it(experts) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    base, plain, _, _ = experts
    name = f"{LAYER}.mlp.experts.gate_up_proj"
    theirs = convert_moe_packed_tensors(base[f"{name}_blocks"], base[f"{name}_scales"])
    assert torch.equal(theirs, plain[name])
    assert theirs.shape == (EXPERTS, INNER, 2 * INTERMEDIATE)


def test_a_merge_onto_decoded_mxfp4_is_verified(experts) -> None:
    base, plain, adapter, delta = experts
    name = f"{LAYER}.mlp.experts.gate_up_proj"
    merged = plain | {name: (plain[name].float() + delta).to(torch.bfloat16)}
    report = lora_check.check(base, adapter, merged, jobs=1)
    assert (report.verdict, found(report)) == (Verdict.VERIFIED, {"LC204"})
    assert len(report.comparisons) == 2
    assert refuted(lora_check.check(base, adapter, plain, jobs=1)) == {name}
    shifted = base | {f"{name}_scales": base[f"{name}_scales"] + 1}
    assert refuted(lora_check.check(shifted, adapter, merged, jobs=1)) == {name}


def test_a_merge_into_mxfp4_is_not_decided(experts) -> None:
    base, plain, adapter, _ = experts
    name = f"{LAYER}.mlp.experts.gate_up_proj"
    for given in (base, plain):
        report = lora_check.check(given, adapter, base | {f"{name}_blocks": base[f"{name}_blocks"] ^ 1}, jobs=1)
        assert (report.verdict, found(report) - {"LC204"}) == (Verdict.INCONCLUSIVE, {"LC303"})
        assert verdicts(report)[name] == "inconclusive"


# ------------------------------------------------------------------------------------------------------ sealed

SEALED = ("GPTQ", "AWQ", "HQQ", "compressed-tensors", "NVFP4", "int8", "MLX")


def sealed(made: Model, scheme: str, names: tuple[str, ...] = LINEAR) -> Tensors:
    rest = {name: one for name, one in made.tensors.items() if name not in names}
    coded: Tensors = {}
    for name in names:
        coded |= files.packed(name, files.SHAPES[name.removesuffix(".weight")], scheme)
    return rest | coded


@pytest.mark.parametrize("scheme", SEALED)
def test_what_is_not_decoded_is_not_decided_and_nothing_is_missing(made: Model, scheme: str) -> None:
    base = sealed(made, scheme)
    for given, merged in ((base, made.merged(made.tensors)), (made.tensors, base)):
        report = check(made, given, merged)
        assert (report.verdict, found(report) - {"LC204"}) == (Verdict.INCONCLUSIVE, {"LC303"})
        assert {name for name, word in verdicts(report).items() if word == "inconclusive"} == set(LINEAR)
        (told,) = [one for one in report.findings if one.code == "LC303"]
        assert scheme.split("-")[0] in told.message
        assert "not decoded here" in told.message


@pytest.mark.parametrize("scheme", SEALED)
def test_sealed_bystanders_are_compared_byte_by_byte(made: Model, scheme: str) -> None:
    base = sealed(made, scheme)
    report = check(made, base, dict(base))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert {name for name, word in verdicts(report).items() if word == "inconclusive"} == set(TARGETS)
    module = UP.removesuffix("weight")
    beside = [name for name in base if name.startswith(module)]
    for name in beside:
        broken = base[name].clone()
        broken.contiguous().view(-1).view(torch.uint8)[0] ^= 1
        report = check(made, base, base | {name: broken})
        assert report.verdict is Verdict.REFUTED, name
        assert refuted(report) == ({UP} if "shape" not in name else set()), name


# -------------------------------------------------------------------------------------------------------- gguf


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_merge_over_a_gguf_base_is_compared_in_the_rows_of_transformers(tmp_path: Path, kind: str) -> None:
    import gguf
    from test_formats_gguf import write

    heads, width, wide = 4, 256, 512
    shapes = {"attn_q": (width, width), "attn_k": (width // 2, width), "ffn_down": (width, wide)}
    random = torch.Generator().manual_seed(4)
    stored = {f"blk.0.{leaf}.weight": 0.05 * torch.randn(shape, generator=random) for leaf, shape in shapes.items()}
    stored["token_embd.weight"] = torch.randn(32, width, generator=random)
    quantised = gguf.GGMLQuantizationType[kind]
    facts = {"{}.attention.head_count": heads, "{}.attention.head_count_kv": 2, "{}.embedding_length": width}
    base = write(tmp_path / "base.gguf", {name: (one.numpy(), quantised) for name, one in stored.items()}, facts=facts)
    plain = {name: numbers(quantised, one) for name, one in stored.items()}
    named = {
        "model.layers.0.self_attn.q_proj.weight": halves(plain["blk.0.attn_q.weight"], heads),
        "model.layers.0.self_attn.k_proj.weight": halves(plain["blk.0.attn_k.weight"], 2),
        "model.layers.0.mlp.down_proj.weight": plain["blk.0.ffn_down.weight"],
        "model.embed_tokens.weight": plain["token_embd.weight"],
    }
    target = "model.layers.0.self_attn.q_proj.weight"
    a, b = 0.03 * torch.randn(3, width, generator=random), 0.03 * torch.randn(width, 3, generator=random)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}
    module = f"base_model.model.{target.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    adapter = files.write(tmp_path / "adapter", factors, config, "adapter")
    model = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 64}

    def merged(name: str, weight: Tensor) -> Path:
        made = as_bf16(named | {target: weight + (b @ a) * (5 / 3)})
        return files.write(tmp_path / name, made, model)

    right = merged("right", named[target])
    assert set(load_file(right / "model.safetensors")) == set(named)
    report = lora_check.check(base, adapter, right, jobs=1)
    assert (report.verdict, found(report)) == (Verdict.VERIFIED, {"LC204"})
    as_stored = lora_check.check(base, adapter, merged("as-stored", plain["blk.0.attn_q.weight"]), jobs=1)
    assert refuted(as_stored) == {target}
    unrounded = lora_check.check(base, adapter, merged("unquantised", halves(stored["blk.0.attn_q.weight"], heads)))
    assert refuted(unrounded) == {target}
    assert json.loads((right / "config.json").read_text()) == model


def numbers(kind: Any, tensor: Tensor) -> Tensor:
    """The tensor as the gguf library stores and decodes it."""
    from gguf.quants import dequantize, quantize

    return torch.from_numpy(dequantize(quantize(tensor.numpy(), kind), kind)).reshape(tensor.shape)


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of ggml's rotary order, which pairs neighbours, in that of transformers, which pairs two halves."""
    size = rows.shape[0] // heads
    order = [head * size + place for head in range(heads) for place in (*range(0, size, 2), *range(1, size, 2))]
    return rows[order]
