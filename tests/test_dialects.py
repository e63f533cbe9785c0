"""Adapters as other tools write them: an honest merge is verified, and each mistake is named.

The merges are those tools' own formulas in plain torch (tests/dialect_files.py), never this package's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dialect_files as files
import pytest
import torch
from dialect_files import Scene, Touched

import lora_check
from lora_check import Verdict, registry
from lora_check.dialects._components import diffusers_name
from lora_check.errors import AdapterConfigError, LoraCheckError, UsageError, WrongInputError

SCENES: Mapping[str, Callable[[], Scene]] = {
    "kohya": files.kohya,
    "kohya without alphas": lambda: files.kohya(alphas=False),
    "kohya over a single file": files.kohya_single_file,
    "LyCORIS LoHa": files.loha,
    "LyCORIS LoKr": files.lokr,
    "diffusers": lambda: files.diffusers("plain"),
    "diffusers with alphas": lambda: files.diffusers("alpha"),
    "diffusers with metadata": lambda: files.diffusers("metadata"),
    "diffusers lora.down": lambda: files.diffusers("lora.down"),
    "diffusers attention processors": lambda: files.diffusers("processors"),
    "mlx-lm": files.mlx,
    "mlx-lm npz": lambda: files.mlx("adapters.npz"),
    "mlx-lm experts": lambda: files.mlx_experts(stacked=True, flat=False),
    "mlx-lm experts, flat A": lambda: files.mlx_experts(stacked=True, flat=True),
    "mlx-lm experts apart": lambda: files.mlx_experts(stacked=False, flat=False),
    "mlx-lm experts apart, flat A": lambda: files.mlx_experts(stacked=False, flat=True),
    "torchtune over transformers": files.torchtune,
    "torchtune over qwen2": lambda: files.torchtune(model_type="qwen2"),
    "torchtune over Meta": lambda: files.torchtune("meta"),
    "torchtune over torchtune": lambda: files.torchtune("torchtune"),
    "llama.cpp over transformers": files.llama_cpp,
    "llama.cpp without alpha": lambda: files.llama_cpp(alpha=0.0),
    "llama.cpp over qwen2": lambda: files.llama_cpp(architecture="qwen2"),
    "loralib": files.loralib,
    "loralib, whole model": lambda: files.loralib(whole=True),
    "loralib, in out": lambda: files.loralib(in_out=True),
    "loralib MergedLinear": lambda: files.merged_linear((True, False, True), in_out=False),
    "loralib MergedLinear, in out": lambda: files.merged_linear((True, True, False), in_out=True),
    "loralib MergedLinear, one": lambda: files.merged_linear((False, False, True), in_out=False),
    "loralib MergedLinear, all": lambda: files.merged_linear((True, True), in_out=True),
    "PEFT 0.2 MergedLinear": lambda: files.merged_linear((True, False, True), in_out=False, peft=True),
    "PEFT 0.2 MergedLinear, in out": lambda: files.merged_linear((False, True, True), in_out=True, peft=True),
    "DeepSpeed-Chat": files.deepspeed,
    "DeepSpeed-Chat, names swapped": lambda: files.deepspeed(swapped=True),
    "DeepSpeed-Chat, whole model": lambda: files.deepspeed(whole=True),
}
MISTAKES: Mapping[str, tuple[str, Callable[[Touched], float]]] = {
    "not applied": ("LC101", lambda one: 0.0),
    "subtracted": ("LC103", lambda one: -one.scale),
    "alpha not divided": ("LC108", lambda one: one.alpha),
    "scale left out": ("LC111", lambda one: 1.0),
    "some other scale": ("LC110", lambda one: 0.43 * one.scale),
}


def made(name: str, **changes: Any) -> Scene:
    torch.manual_seed(len(name))
    return replace(SCENES[name](), **changes)


def check(scene: Scene, root: Path, merged: Mapping[str, torch.Tensor] | None = None) -> lora_check.Report:
    return lora_check.check(*scene.write(root, merged), jobs=1)


def codes(report: lora_check.Report) -> dict[str, str | None]:
    return {one.tensor: one.code for one in report.comparisons if one.verdict is Verdict.REFUTED}


# --------------------------------------------------------------------------------------------- what every tool does


@pytest.mark.parametrize("name", SCENES)
def test_an_honest_merge_is_verified(name: str, tmp_path: Path) -> None:
    scene = made(name)
    report = check(scene, tmp_path)
    assert (report.verdict, report.findings) == (Verdict.VERIFIED, ())
    assert report.run.adapters[0]["dialect"] == scene.dialect
    assert {one.tensor for one in report.comparisons if one.kind == "target"} == set(scene.touched)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", SCENES)
def test_each_mistake_is_named_in_every_tensor_where_it_shows(name: str, mistake: str, tmp_path: Path) -> None:
    scene, (code, scale) = made(name), MISTAKES[mistake]
    report = check(scene, tmp_path, scene.merged(scale))
    wrong = {tensor for tensor, one in scene.touched.items() if scale(one) != one.scale}
    if not wrong:
        assert report.verdict is Verdict.VERIFIED
        return
    assert report.verdict is Verdict.REFUTED
    assert codes(report).keys() == wrong
    named = set(codes(report).values())
    if (
        scene.replaced and mistake == "some other scale"
    ):  # the factor is fitted to MERGED - BASE, not to what was loaded
        assert named == {"LC199"}
        return
    assert code in named
    # Where alpha is r, or 1, two of these mistakes write the same numbers.
    assert named <= {code, "LC108", "LC111"}


SQUARE = {
    "kohya": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "diffusers": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "mlx-lm": "model.layers.1.self_attn.o_proj.weight",
    "torchtune over transformers": "model.layers.0.self_attn.o_proj.weight",
    "llama.cpp over transformers": "model.layers.0.self_attn.o_proj.weight",
    "DeepSpeed-Chat": "model.decoder.layers.0.self_attn.q_proj.weight",
    "DeepSpeed-Chat, names swapped": "model.decoder.layers.0.self_attn.q_proj.weight",
    "loralib MergedLinear": "h.0.c_proj.weight",
    "loralib MergedLinear, in out": "h.0.c_proj.weight",
    "PEFT 0.2 MergedLinear": "h.0.c_proj.weight",
    "PEFT 0.2 MergedLinear, in out": "h.0.c_proj.weight",
}


@pytest.mark.parametrize("name", SQUARE)
def test_a_delta_that_was_turned_over_is_named(name: str, tmp_path: Path) -> None:
    scene, tensor = made(name), SQUARE[name]
    one = scene.touched[tensor]
    merged = scene.merged() | {tensor: scene.base[tensor] + one.scale * one.product.T}
    assert codes(check(scene, tmp_path, merged)) == {tensor: "LC104"}


def test_every_dialect_has_a_scene() -> None:
    assert {made(name).dialect for name in SCENES} == registry.load("dialects").keys() - {"peft"}


@pytest.mark.parametrize("name", SCENES)
def test_one_dialect_recognises_each_file_besides_the_general_one(name: str) -> None:
    scene = made(name)
    found = [
        one.name for one in registry.load("dialects").values() if one.recognises(scene.told or {}, [*scene.adapter])
    ]
    assert set(found) - {"peft"} == {scene.dialect}


@pytest.mark.parametrize("name", ["llama-qv", "gpt2-attn", "linear", "lora-dora"])
def test_no_other_dialect_recognises_what_peft_writes(name: str) -> None:
    told = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    plain = {
        "transformer.h.0.attn.c_attn": 1,
        "transformer.blocks.0.attn.Wqkv": 1,
        "model.layers.0.self_attn.q_proj": 1,
    }
    names = [
        f"{prefix}{one}.lora_{side}.weight" for one in plain for side in "AB" for prefix in ("", "base_model.model.")
    ]
    others = {key: one for key, one in registry.load("dialects").items() if key != "peft"}
    for config in (told, {}):
        assert [key for key, one in others.items() if one.recognises(config, names)] == []


@pytest.mark.parametrize("name", ["mlx-lm", "mlx-lm npz", "diffusers"])
def test_the_folder_of_an_adapter_serves_as_well_as_its_file(name: str, tmp_path: Path) -> None:
    base, adapter, merged = made(name).write(tmp_path)
    assert lora_check.check(base, adapter.parent, merged, jobs=1).verdict is Verdict.VERIFIED


def test_a_module_may_stand_under_the_name_of_lycoris_alone(tmp_path: Path) -> None:
    scene = made("LyCORIS LoKr")
    base = {name.removeprefix("unet."): tensor for name, tensor in scene.base.items()}
    touched = {name.removeprefix("unet."): one for name, one in scene.touched.items()}
    adapter = {name.replace("lora_unet_", "lycoris_"): tensor for name, tensor in scene.adapter.items()}
    assert check(replace(scene, base=base, touched=touched, adapter=adapter), tmp_path).verdict is Verdict.VERIFIED


ORIGINAL_NAMES = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.5.1.transformer_blocks.0.attn1.to_q": "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.11.0.emb_layers.1": "down_blocks.3.resnets.1.time_emb_proj",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "middle_block.2.in_layers.0": "mid_block.resnets.1.norm1",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.11.1.proj_out": "up_blocks.3.attentions.2.proj_out",
    "output_blocks.11.0.out_layers.0": "up_blocks.3.resnets.2.norm2",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "out.2": "conv_out",
    "double_blocks.0.img_attn.qkv": "double_blocks.0.img_attn.qkv",
}
"""The names of Stable Diffusion 1 and XL in a single file, and those that diffusers gives them."""


@pytest.mark.parametrize("name", ORIGINAL_NAMES)
def test_the_layers_of_a_single_file_are_counted_as_diffusers_counts_them(name: str) -> None:
    assert diffusers_name(name) == ORIGINAL_NAMES[name]


SPOILT: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a single number": lambda x: x.flatten()[0].clone(),
    "no numbers": lambda x: torch.zeros(0),
    "a row too few": lambda x: x[1:].clone(),
    "integers": lambda x: x.to(torch.int32),
}


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("name", SCENES)
def test_a_factor_of_another_shape_or_kind_is_never_passed_over(name: str, spoil: str, tmp_path: Path) -> None:
    scene = made(name)
    keys = [key for key, tensor in scene.adapter.items() if tensor.ndim > 1 and key not in scene.replaced]
    adapter = {**scene.adapter, keys[0]: SPOILT[spoil](scene.adapter[keys[0]])}
    report = check(replace(scene, adapter=adapter), tmp_path)
    assert 0 < len(undecided(report)) <= len(scene.touched)


# ------------------------------------------------------------------------------------------------- rows and groups


@pytest.mark.parametrize("name", ["torchtune over transformers", "llama.cpp over transformers"])
def test_rows_of_q_and_k_that_were_not_put_back_are_refuted(name: str, tmp_path: Path) -> None:
    scene = made(name)
    spoilt = {
        tensor: replace(one, product=files.to_neighbours(one.product, files.heads_of(tensor[15:-7])))
        for tensor, one in scene.touched.items()
        if files.heads_of(tensor[15:-7])
    }
    merged = replace(scene, touched={**scene.touched, **spoilt}).merged()
    assert codes(check(scene, tmp_path, merged)).keys() == spoilt.keys()
    assert len(spoilt) == 4


@pytest.mark.parametrize("in_out", [False, True])
def test_groups_that_went_to_the_wrong_outputs_are_refuted(in_out: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    scene, tensor = files.merged_linear((True, False, True), in_out=in_out), "h.0.c_attn.weight"
    parts = scene.touched[tensor].product.chunk(3, dim=int(in_out))
    wrong = torch.cat([parts[0], parts[2], parts[1]], dim=int(in_out))
    merged = replace(scene, touched={**scene.touched, tensor: replace(scene.touched[tensor], product=wrong)}).merged()
    assert codes(check(scene, tmp_path, merged)).keys() == {tensor}


def test_experts_in_another_order_are_refuted(tmp_path: Path) -> None:
    scene = made("mlx-lm experts")
    turned = {name: replace(one, product=one.product.roll(1, 0)) for name, one in scene.touched.items()}
    assert codes(check(scene, tmp_path, replace(scene, touched=turned).merged())).keys() == scene.touched.keys()


def test_the_alpha_of_the_first_module_for_all_is_told_as_a_pattern_that_was_ignored(tmp_path: Path) -> None:
    scene = made("kohya")
    first = scene.adapter[min(name for name in scene.adapter if name.endswith(".alpha"))].item()
    found = codes(check(scene, tmp_path, scene.merged(lambda one: first / one.rank)))
    assert set(found.values()) == {"LC109"}
    assert found.keys() == {name for name, one in scene.touched.items() if one.alpha != first}


# --------------------------------------------------------------------------------------------- orders of operations

HALVES = [torch.bfloat16, torch.float16]


def halved(name: str, dtype: torch.dtype, *, factors: bool = True) -> Scene:
    scene = made(name)
    base = {key: tensor.to(dtype) for key, tensor in scene.base.items()}
    return replace(scene, base=base, adapter={k: v.to(dtype) if factors else v for k, v in scene.adapter.items()})


@pytest.mark.parametrize("dtype", HALVES)
def test_deepspeed_fuses_in_the_dtype_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    scene = halved("DeepSpeed-Chat", dtype)
    merged = dict(scene.base)
    for name, one in scene.touched.items():
        left, right = (scene.adapter[name.replace(".weight", f".lora_{side}_weight")] for side in ("left", "right"))
        merged[name] = merged[name] + one.scale * torch.matmul(left.t(), right.t())
    assert check(scene, tmp_path, merged).verdict is Verdict.VERIFIED


@pytest.mark.parametrize("dtype", HALVES)
def test_mlx_lm_rounds_the_delta_before_it_adds_it(dtype: torch.dtype, tmp_path: Path) -> None:
    scene = halved("mlx-lm", dtype, factors=False)
    merged = dict(scene.base)
    for name, one in scene.touched.items():
        a, b = (scene.adapter[name.replace(".weight", f".lora_{side}")] for side in "ab")
        delta = (one.scale * a) @ b if "embed" in name else (one.scale * b.T) @ a.T
        merged[name] = merged[name] + delta.to(dtype)
    report = check(scene, tmp_path, merged)
    assert report.verdict is Verdict.VERIFIED
    assert {one.arithmetic for one in report.comparisons if one.kind == "target"} == {"rounded-delta"}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("precision", ["float", "half"])
def test_sd_scripts_merges_in_the_precision_it_is_told(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    scene = halved("kohya", dtype)
    work = torch.float32 if precision == "float" else dtype
    merged = dict(scene.base)
    for name, one in scene.touched.items():
        part, _, module = name.removesuffix(".weight").partition(".")
        key = f"lora_{'unet' if part == 'unet' else 'te'}_{module.replace('.', '_')}"
        up, down = (scene.adapter[f"{key}.lora_{side}.weight"].to(work).flatten(1) for side in ("up", "down"))
        merged[name] = (merged[name].to(work) + 1.0 * (up @ down).reshape(merged[name].shape) * one.scale).to(dtype)
    assert check(scene, tmp_path, merged).verdict is Verdict.VERIFIED


# ------------------------------------------------------------------------------------------------------ magnitudes


@pytest.mark.parametrize("name", ["mlx-lm", "torchtune over torchtune", "torchtune over transformers"])
def test_a_decomposed_merge_is_verified_and_a_magnitude_left_out_is_named(name: str, tmp_path: Path) -> None:
    plain = made(name)
    kept = {tensor: one for tensor, one in plain.touched.items() if "embed" not in tensor}
    factors = {key: tensor for key, tensor in plain.adapter.items() if "embed" not in key}
    scene, merged = files.decomposed(replace(plain, touched=kept, adapter=factors))
    if name.endswith("transformers"):  # the magnitudes of q and k are in the order of torchtune's rows
        adapter = {}
        for key, tensor in scene.adapter.items():
            ours = files.TORCHTUNE.get(key.removeprefix("model.layers.")[2:].removesuffix(".magnitude"))
            own = f"layers.{key.split('.')[2]}.{ours}.magnitude" if ours else key
            heads = files.heads_of(key.removeprefix("model.layers.")[2:].removesuffix(".magnitude"))
            adapter[own] = files.to_neighbours(tensor, heads) if heads else tensor
        scene = replace(scene, adapter=adapter)
    scene = replace(scene, told={**(scene.told or {}), **({"fine_tune_type": "dora"} if name == "mlx-lm" else {})})
    assert check(scene, tmp_path / "right", merged).verdict is Verdict.VERIFIED
    assert set(codes(check(scene, tmp_path / "wrong", plain.merged() | _others(plain, kept))).values()) == {"LC106"}


def _others(scene: Scene, kept: Mapping[str, Touched]) -> dict[str, torch.Tensor]:
    return {name: scene.base[name] for name in scene.touched if name not in kept}


# ----------------------------------------------------------------------------------------- what cannot be decided


def undecided(report: lora_check.Report) -> set[str]:
    """The tensors that are neither verified nor refuted; none may be refuted."""
    assert codes(report) == {}
    assert report.verdict is Verdict.INCONCLUSIVE
    return {one.tensor for one in report.comparisons if one.verdict is Verdict.INCONCLUSIVE}


def told(report: lora_check.Report) -> str:
    return "; ".join(one.message for one in report.findings)


KEY, CONV = "lora_unet_mid_block_resnets_1_conv2", "unet.mid_block.resnets.1.conv2.weight"
STRANGE: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "dora_scale": ("epsilon", (1, 8, 1, 1)),
    "lora_mid.weight": ("core", (3, 3, 3, 3)),
    "oft_blocks": ("oft_blocks", (2, 5, 5)),
    "diff_b": ("diff_b", (10,)),
    "hada_w1_a": ("hada_w1_a", (10, 2)),
}


@pytest.mark.parametrize("leaf", STRANGE)
def test_what_lycoris_adds_to_one_module_leaves_that_module_undecided(leaf: str, tmp_path: Path) -> None:
    scene, (words, shape) = made("kohya"), STRANGE[leaf]
    report = check(replace(scene, adapter={**scene.adapter, f"{KEY}.{leaf}": files.random(*shape)}), tmp_path)
    assert undecided(report) == {CONV}
    assert words in told(report)


def test_a_module_of_another_method_is_undecided_and_the_others_are_not(tmp_path: Path) -> None:
    scene, other = made("kohya"), made("LyCORIS LoHa")
    both = replace(scene, base={**scene.base, **other.base}, adapter={**scene.adapter, **other.adapter})
    report = check(both, tmp_path, {**other.merged(), **scene.merged()})
    assert undecided(report) == set(other.touched)
    assert "LOHA" in told(report)


def test_a_flat_name_that_fits_two_modules_leaves_both_undecided(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = files.weights({"a.b_c": (6, 5), "a_b.c": (6, 5), "other": (7, 5)}, "unet.")
    pairs = {key: files.factors((rows, 5), 2) for key, rows in (("a_b_c", 6), ("other", 7))}
    adapter = {}
    for key, (a, b, _) in pairs.items():
        adapter |= {f"lora_unet_{key}.lora_down.weight": a, f"lora_unet_{key}.lora_up.weight": b}
    touched = {"unet.other.weight": Touched(pairs["other"][2], 2.0, 2)}
    report = check(Scene("kohya", base, adapter, touched), tmp_path)
    assert undecided(report) == {"unet.a.b_c.weight", "unet.a_b.c.weight"}
    assert "may be any of" in told(report)


@pytest.mark.parametrize("said", ['{"rs_lora": "True"}', '{"algo": "loha", "rs_lora": true}', "{rs_lora"])
def test_rs_lora_among_the_arguments_of_the_training_is_not_ignored(said: str, tmp_path: Path) -> None:
    scene = made("LyCORIS LoHa", metadata={"ss_network_args": said})
    assert undecided(check(scene, tmp_path)) == set(scene.touched)


@pytest.mark.parametrize("said", ['{"rs_lora": "False"}', '{"algo": "loha", "conv_dim": "4"}', "[]", "{}"])
def test_other_arguments_of_the_training_change_nothing(said: str, tmp_path: Path) -> None:
    assert check(made("LyCORIS LoHa", metadata={"ss_network_args": said}), tmp_path).verdict is Verdict.VERIFIED


def test_modules_that_base_lacks_are_told_and_never_passed_over(tmp_path: Path) -> None:
    scene = made("kohya")
    alone = {name: tensor for name, tensor in scene.base.items() if name.startswith("unet.")}
    touched = {name: one for name, one in scene.touched.items() if name in alone}
    report = check(replace(scene, base=alone, touched=touched), tmp_path)
    assert undecided(report) == set()
    assert [one.code for one in report.findings] == ["LC205"]


def test_an_alpha_without_factors_is_told(tmp_path: Path) -> None:
    scene = made("kohya")
    report = check(replace(scene, adapter={**scene.adapter, "lora_unet_lone.alpha": torch.tensor(2.0)}), tmp_path)
    assert undecided(report) == set()
    assert "lora_unet_lone.alpha" in told(report)


def test_factors_of_a_matrix_over_a_1x1_convolution_are_the_same_numbers(tmp_path: Path) -> None:
    scene = made("kohya")
    key = "lora_unet_down_blocks_0_attentions_0_proj_in"
    flat = {
        f"{key}.lora_{side}.weight": scene.adapter[f"{key}.lora_{side}.weight"][:, :, 0, 0] for side in ("up", "down")
    }
    report = check(replace(scene, adapter={**scene.adapter, **flat}), tmp_path)
    assert report.verdict is Verdict.VERIFIED


def test_tensors_in_memory_need_no_file() -> None:
    scene = made("kohya")
    report = lora_check.check(dict(scene.base), dict(scene.adapter), scene.merged())
    assert report.verdict is Verdict.VERIFIED
    assert lora_check.check(dict(scene.base), dict(scene.adapter), dict(scene.base)).verdict is Verdict.REFUTED


def test_diffusers_without_alphas_and_with_several_ranks_is_undecided(tmp_path: Path) -> None:
    scene = made("diffusers with metadata", metadata={})
    assert undecided(check(scene, tmp_path)) == set(scene.touched)


def test_two_sources_of_one_scale_are_undecided(tmp_path: Path) -> None:
    scene, one = made("diffusers with metadata"), "unet.conv_in"
    report = check(replace(scene, adapter={**scene.adapter, f"{one}.alpha": torch.tensor(2.0)}), tmp_path)
    assert undecided(report) == {f"{one}.weight"}


@pytest.mark.parametrize(
    ("key", "value"), [("unet.use_qalora", True), ("unet.init_lora_weights", "pissa"), ("unet.key_of_tomorrow", 1)]
)
def test_metadata_that_cannot_be_honoured_is_not_ignored(key: str, value: object, tmp_path: Path) -> None:
    import json

    scene = made("diffusers with metadata")
    said = json.loads(scene.metadata["lora_adapter_metadata"]) | {key: value}
    report = check(replace(scene, metadata={"lora_adapter_metadata": json.dumps(said)}), tmp_path)
    assert undecided(report) == set(scene.touched)


MLX: Mapping[str, tuple[dict[str, Any], bool]] = {
    "alpha beside scale, from a release that ignores it": ({"num_layers": 1, "alpha": 16}, True),
    "alpha beside scale, and no release told": ({"lora_layers": 1, "alpha": 16}, False),
    "an alpha that makes no difference": ({"lora_layers": 1, "alpha": 3}, True),
    "an unknown parameter": ({"num_layers": 1, "rank_pattern": {}}, False),
    "an unknown type": ({"num_layers": 1, "fine_tune_type": "vera"}, False),
}


@pytest.mark.parametrize("case", MLX)
def test_what_an_mlx_configuration_says_is_honoured_or_told(case: str, tmp_path: Path) -> None:
    said, known = MLX[case]
    outer = {key: value for key, value in said.items() if key in ("num_layers", "lora_layers", "fine_tune_type")}
    inner = {"rank": 3, "scale": 2.7, "dropout": 0.0} | {key: said[key] for key in said.keys() - outer.keys()}
    scene = made("mlx-lm", told=outer | {"lora_parameters": inner})
    report = check(scene, tmp_path)
    if known:
        assert report.verdict is Verdict.VERIFIED
    else:
        assert undecided(report) == set(scene.touched)


def test_a_full_fine_tune_of_mlx_lm_is_a_copy_of_its_tensors(tmp_path: Path) -> None:
    scene = made("mlx-lm", touched={}, told={"fine_tune_type": "full", "num_layers": 1})
    whole = {name: tensor + files.random(*tensor.shape) for name, tensor in scene.base.items() if "layers.1." in name}
    full = replace(scene, adapter=whole, replaced=whole)
    assert check(full, tmp_path / "right").verdict is Verdict.VERIFIED
    report = check(full, tmp_path / "wrong", scene.base)
    assert codes(report).keys() == whole.keys()


def test_torchtune_over_a_model_whose_rows_are_not_known_leaves_q_and_k_undecided(tmp_path: Path) -> None:
    scene = made("torchtune over qwen2", config={**files.LLAMA, "model_type": "olmo"})
    report = check(scene, tmp_path)
    assert undecided(report) == {name for name in scene.touched if ".q_proj." in name or ".k_proj." in name}
    assert "'olmo'" in told(report)


def test_torchtune_over_a_base_that_fuses_query_key_and_value(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scene = files.torchtune(model_type="phi3")
    merged = scene.merged()

    def fused(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """transformers' Phi-3 keeps three projections in one tensor."""
        found = {name: tensor for name, tensor in tensors.items() if "self_attn.o_proj" in name or ".down_proj" in name}
        for n in range(2):
            layer = f"model.layers.{n}"
            parts = [tensors[f"{layer}.self_attn.{one}_proj.weight"] for one in "qkv"]
            found[f"{layer}.self_attn.qkv_proj.weight"] = torch.cat(parts)
            found[f"{layer}.mlp.gate_up_proj.weight"] = torch.cat(
                [tensors[f"{layer}.mlp.{one}_proj.weight"] for one in ("gate", "up")]
            )
        return found

    wanted = replace(scene, base=fused(scene.base))
    assert check(wanted, tmp_path / "right", fused(merged)).verdict is Verdict.VERIFIED
    wrong = check(wanted, tmp_path / "wrong", fused(scene.base))
    assert len(codes(wrong)) == 8


def test_loralib_without_a_rank_in_the_configuration_takes_that_of_the_factors(tmp_path: Path) -> None:
    assert check(made("loralib", told={"lora_alpha": 8.0}), tmp_path).verdict is Verdict.VERIFIED


def test_groups_that_do_not_fit_the_configuration_are_undecided(tmp_path: Path) -> None:
    scene = made("loralib MergedLinear")
    report = check(replace(scene, told={**(scene.told or {}), "enable_lora": [True, True, True]}), tmp_path)
    assert undecided(report) == {"h.0.c_attn.weight"}


def test_factors_that_fit_either_way_round_are_undecided(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = files.weights({"q": (4, 4)})
    adapter = {"q.lora_right_weight": files.random(4, 4), "q.lora_left_weight": files.random(4, 4)}
    scene = Scene("deepspeed-chat", base, adapter, {}, {}, {"lora_scaling": 1})
    assert undecided(check(scene, tmp_path)) == {"q.weight"}


@pytest.mark.parametrize("said", [{"lora_dim": 4}, {"lora_rank_alpha": 7}])
def test_a_deepspeed_configuration_that_does_not_fit_is_told(said: dict[str, Any], tmp_path: Path) -> None:
    scene = made("DeepSpeed-Chat")
    report = check(replace(scene, told={**(scene.told or {}), **said}), tmp_path)
    assert undecided(report) == set(scene.touched)


def test_vectors_that_llama_cpp_does_not_read_are_told(tmp_path: Path) -> None:
    scene = made("llama.cpp over transformers")
    report = check(replace(scene, adapter={**scene.adapter, "blk.0.attn_norm.weight": files.random(24)}), tmp_path)
    assert undecided(report) == set()
    assert "blk.0.attn_norm.weight" in told(report)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_llama_cpp_over_a_model_in_gguf_has_the_rows_of_that_model(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    scene = files.llama_cpp(architecture=architecture)
    adapter = scene.write(tmp_path)[1]
    models = []
    for place, tensors in (("base", scene.base), ("merged", scene.merged())):
        renamed = {}
        for name, tensor in tensors.items():
            heads = files.heads_of(name[15:-7]) if architecture == "llama" else 0
            renamed[files.gguf_name(name)] = files.to_neighbours(tensor, heads) if heads else tensor
        models.append(files.write_gguf_model(tmp_path / f"{place}.gguf", renamed, architecture))
    report = lora_check.check(models[0], adapter, models[1], jobs=1)
    assert report.verdict is Verdict.VERIFIED
    assert {one.tensor for one in report.comparisons if one.kind == "target"} == {*map(files.gguf_name, scene.touched)}


def test_heads_that_the_base_does_not_tell_leave_q_and_k_undecided(tmp_path: Path) -> None:
    config = {key: value for key, value in files.LLAMA.items() if not key.startswith("num_")}
    scene = made("llama.cpp over transformers", config={**config, "tie_word_embeddings": False})
    report = check(scene, tmp_path)
    assert undecided(report) == {name for name in scene.touched if ".q_proj." in name or ".k_proj." in name}


# ------------------------------------------------------------------------------------------------ one clear sentence


def refused(error: type[LoraCheckError], scene: Scene, root: Path) -> str:
    """The sentence; every refusal has a hint and names the file."""
    base, adapter, merged = scene.write(root)
    with pytest.raises(error) as caught:
        lora_check.check(base, adapter, merged, jobs=1)
    assert caught.value.hint
    assert str(adapter.parent) in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


SCALELESS: Mapping[str, tuple[str, dict[str, Any] | None]] = {
    "loralib": ("no lora_alpha", None),
    "loralib, whole model": ("no lora_alpha", {"r": 3}),
    "DeepSpeed-Chat": ("no lora_scaling", None),
    "mlx-lm": ("no lora_parameters", {"fine_tune_type": "lora"}),
    "mlx-lm npz": ("no scale", {"lora_parameters": {"rank": 8}}),
    "torchtune over transformers": ("no lora_alpha", {"r": 4, "peft_type": "LORA"}),
}


@pytest.mark.parametrize("name", SCALELESS)
def test_a_scale_that_no_file_tells_is_asked_for(name: str, tmp_path: Path) -> None:
    words, said = SCALELESS[name]
    sentence = refused(AdapterConfigError, made(name, told=said), tmp_path)
    assert words in sentence
    assert "cannot be known" in sentence


@pytest.mark.parametrize("name", ["mlx-lm", "torchtune over transformers"])
def test_a_configuration_that_the_tool_always_writes_is_missed(name: str, tmp_path: Path) -> None:
    assert "adapter_config.json is not there" in refused(AdapterConfigError, made(name, told=None), tmp_path)


@pytest.mark.parametrize("value", [torch.tensor([1.0, 2.0]), torch.tensor(float("nan")), torch.ones(0)])
def test_an_alpha_that_is_no_number(value: torch.Tensor, tmp_path: Path) -> None:
    scene = made("kohya")
    sentence = refused(AdapterConfigError, replace(scene, adapter={**scene.adapter, f"{KEY}.alpha": value}), tmp_path)
    assert f"{KEY}.alpha" in sentence


@pytest.mark.parametrize("said", ["{", "[1]", '"text"'])
def test_metadata_that_is_no_object(said: str, tmp_path: Path) -> None:
    scene = made("diffusers", metadata={"lora_adapter_metadata": said})
    assert "no JSON object" in refused(AdapterConfigError, scene, tmp_path)


NO_ADAPTERS: Mapping[str, tuple[str, ...]] = {
    "a full checkpoint": ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"),
    "an optimizer's state": (
        "model.layers.0.mlp.up_proj.weight.exp_avg",
        "model.layers.0.mlp.up_proj.weight.exp_avg_sq",
    ),
    "a trained prompt": ("prompt_embeddings",),
    "a textual inversion": ("emb_params",),
}


@pytest.mark.parametrize("what", NO_ADAPTERS)
@pytest.mark.parametrize("said", [None, {"model_type": "llama"}])
def test_a_file_that_is_no_adapter_says_what_it_looks_like(what: str, said: Any, tmp_path: Path) -> None:
    adapter = {name: torch.ones(2, 3) for name in NO_ADAPTERS[what]}
    scene = Scene("", files.llama(), adapter, {}, told=said)
    assert f"looks like {what}" in refused(WrongInputError, scene, tmp_path)


def test_names_that_nobody_knows_are_named(tmp_path: Path) -> None:
    scene = Scene("", files.llama(), {"q_proj_low_rank_left": torch.ones(2, 3)}, {})
    assert "'q_proj_low_rank_left'" in refused(AdapterConfigError, scene, tmp_path)


def test_another_tools_adapter_is_not_combined_as_peft_combines(tmp_path: Path) -> None:
    scene = made("kohya")
    base, adapter, merged = scene.write(tmp_path)
    with pytest.raises(UsageError, match="PEFT cannot combine"):
        lora_check.check(base, [adapter, adapter], merged, combination="linear", jobs=1)
