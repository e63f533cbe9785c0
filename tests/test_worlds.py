"""Hold the checker against live PEFT: every honest merge is verified, and each world's own mistake is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import peft_worlds
import pytest
import torch
from torch import Tensor

import lora_check
from lora_check.__main__ import main

CASES = peft_worlds.cases()
UNSAFE = [(name, dtype) for name, dtype, safe in CASES if not safe]
HIDDEN = "carried-base"
"""PEFT ignores one tensor of this adapter file, so that what the adapter says is not quite certain."""

INEXACT = {
    ("gpt2-dora", "fp32"): r"\.c_(attn|proj)\.weight$",
    ("embedding-dora", "fp32"): r"^emb\.weight$",
    ("conv1d", "fp32"): r"^thin\.weight$",
}
"""Sums of PEFT that are replayed in another order: the norm over columns, and a convolution of width 1."""


def ident(case: tuple[object, ...]) -> str:
    return "-".join({True: "safe", False: "unsafe"}.get(part, str(part)) for part in case)


# ---------------------------------------------------------------------------------------------- honest merges


def regimes(name: str, dtype: str, safe: bool, recipe: str) -> set[str]:
    """The arithmetic in which PEFT 0.21 merges a target of this recipe."""
    if dtype == "fp32" or "dora" in recipe or recipe == "lora-bias":
        return {"fp32-add"}
    if name == "no-autocast":
        return {"rounded-factors-and-delta"}
    if name == "low-cpu-mem":
        return {"rounded-factors-and-delta" if safe else "rounded-factors"}
    if recipe.endswith("lora-embedding"):  # its delta is stored in any case; the model's other targets choose the name
        return {"fp32-add", "rounded-delta"} if safe and name != "embedding" else {"fp32-add"}
    if name == "mha":  # in_proj has a stored delta in any case; out_proj a stored one and then one that is not
        return {"rounded-delta"} if recipe == "lora-linear" else {"fp32-add"}
    return {"rounded-delta" if safe else "fp32-add"}


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_a_merge_by_peft_is_verified_and_its_arithmetic_named(world, case) -> None:
    name, dtype, safe = case
    report = lora_check.check(*world(name, dtype, safe).args, jobs=1)
    doubtful = name == HIDDEN
    assert report.verdict.value == ("inconclusive" if doubtful else "verified")
    assert {one.code for one in report.findings if one.severity != "info"} == ({"LC205"} if doubtful else set())
    assert {one.verdict.value for one in report.comparisons} == {"verified"}
    targets = [one for one in report.comparisons if one.kind == "target"]
    assert targets
    for one in targets:
        assert not one.vanished
        assert one.arithmetic in regimes(name, dtype, safe, one.recipe), one.tensor
        assert 0.9 < one.survival < 1.1, one.tensor
    inexact = {one.tensor for one in report.comparisons if not one.exact}
    allowed = INEXACT.get((name, dtype), r"^$")
    assert {one for one in inexact if not re.search(allowed, one)} == set()


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_every_tensor_of_the_merged_file_is_judged_once(world, load, case) -> None:
    inputs = world(*case)
    report = lora_check.check(*inputs.args, jobs=1)
    assert sorted(one.tensor for one in report.comparisons) == sorted(load(inputs.merged))


def test_fp16_and_bf16_worlds_keep_their_names_apart(world) -> None:
    found = {
        dtype: {one.dtype for one in lora_check.check(*world("llama-qv", dtype).args).comparisons}
        for dtype in ("fp32", "bf16", "fp16")
    }
    assert found == {"fp32": {"float32"}, "bf16": {"bfloat16"}, "fp16": {"float16"}}


# -------------------------------------------------------------------------------------- mistakes, in plain torch


@dataclass(frozen=True)
class Scene:
    """One world's tensors under the names of its merged file; `base` in the dtype it is loaded in."""

    base: Mapping[str, Tensor]
    merged: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    config: Mapping[str, object]

    @property
    def modules(self) -> list[str]:
        """The modules that have a pair of factors."""
        return sorted({match[1] for key in self.factors if (match := re.match(r"(.+?)\.lora_(?:embedding_)?A\b", key))})

    @property
    def targets(self) -> list[str]:
        return [f"{module}.weight" for module in self.modules if f"{module}.weight" in self.merged]

    def product(self, name: str) -> Tensor:
        """The unscaled delta in the shape of a weight kept (out, in)."""
        module = name.removesuffix(".weight")
        if f"{module}.lora_embedding_A" in self.factors:
            a, b = (self.factors[f"{module}.lora_embedding_{side}"].float() for side in "AB")
            return (b @ a).T
        a, b = (self.factors[f"{module}.lora_{side}.weight"].float().flatten(1) for side in "AB")
        return b @ a

    def added(self, name: str, scale: float, start: Tensor | None = None) -> Tensor:
        """The base, or another start, plus so many products, stored once."""
        start = self.base[name] if start is None else start
        return (start.float() + (scale * self.product(name)).reshape(start.shape)).to(start.dtype)

    @property
    def scale(self) -> float:
        return self.config["lora_alpha"] / self.config["r"]


Changes = dict[str, Tensor | None]
Mistake = Callable[[Scene], Changes]


def base_kept(pattern: str) -> Mistake:
    """These tensors are still the base's."""
    return lambda scene: {name: scene.base[name] for name in scene.merged if re.search(pattern, name)}


def every_target(change: Callable[[Scene, str], Tensor]) -> Mistake:
    return lambda scene: {name: change(scene, name) for name in scene.targets}


def scaled(number: Callable[[Mapping[str, object]], float]) -> Mistake:
    """Another number in the place of the scale."""
    return every_target(lambda scene, name: scene.added(name, number(scene.config)))


def twice(scene: Scene) -> Changes:
    """Merge into the merged file."""
    return {name: scene.added(name, scene.scale, scene.merged[name]) for name in scene.targets}


def transposed(scene: Scene) -> Changes:
    """Add the product as if a square weight were kept the other way round."""
    flip = scene.config["fan_in_fan_out"]
    square = [name for name in scene.targets if len(set(scene.base[name].shape)) == 1]
    assert square
    return {
        name: (scene.base[name].float() + scene.scale * (scene.product(name) if flip else scene.product(name).T)).to(
            scene.base[name].dtype
        )
        for name in square
    }


def without_magnitude(scene: Scene) -> Changes:
    """Plain LoRA, where the adapter is a DoRA."""
    flip = scene.config["fan_in_fan_out"]
    return {
        name: (scene.base[name].float() + scene.scale * (scene.product(name).T if flip else scene.product(name))).to(
            scene.base[name].dtype
        )
        for name in scene.targets
    }


def delta_only(scene: Scene) -> Changes:
    return {name: (scene.scale * scene.product(name)).to(scene.base[name].dtype) for name in scene.targets}


def dropped(name: str) -> Mistake:
    return lambda scene: {name: None}


def extra(scene: Scene) -> Changes:
    return {"model.layers.2.mlp.up_proj.weight": next(iter(scene.merged.values()))}


def one_bit(name: str) -> Mistake:
    """The lowest bit of one element flipped."""

    def flip(scene: Scene) -> Changes:
        changed = scene.merged[name].clone()
        words = changed.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[changed.element_size()])
        words.view(-1)[-1] ^= 1
        return {name: changed}

    return flip


def one_element(scene: Scene) -> Changes:
    """A few neighbours beside, in one element of one target; no mistake that has a name."""
    name = scene.targets[0]
    changed = scene.merged[name].clone()
    changed.view(torch.int16 if changed.element_size() == 2 else torch.int32).view(-1)[7] += 1000
    return {name: changed}


def not_a_number(scene: Scene) -> Changes:
    name = scene.targets[-1]
    changed = scene.merged[name].clone()
    changed.view(-1)[3] = torch.nan
    return {name: changed}


def reshaped(scene: Scene) -> Changes:
    name = next(name for name in scene.targets if scene.merged[name].shape[0] != scene.merged[name].shape[1])
    return {name: scene.merged[name].T}


def through_bf16(scene: Scene) -> Changes:
    return {name: one.bfloat16().to(one.dtype) for name, one in scene.merged.items()}


def without_patterns(scene: Scene) -> Changes:
    return {name: scene.added(name, scene.scale) for name in scene.targets}


def rows_added(scene: Scene) -> Changes:
    """The trained rows, whose name says delta, are added to the base."""
    name = "model.embed_tokens.weight"
    rows = next(one for key, one in scene.factors.items() if key.endswith("trainable_tokens_delta"))
    changed = scene.base[name].clone()
    changed[[2, 7, 31]] = (changed[[2, 7, 31]].float() + rows.float()).to(changed.dtype)
    return {name: changed}


def biases_added(scene: Scene) -> Changes:
    """The trained biases are added, where they should replace."""
    names = [name for name in scene.factors if name in scene.merged and name.endswith(".bias")]
    assert names
    return {name: (scene.base[name].float() + scene.factors[name].float()).to(scene.base[name].dtype) for name in names}


def unscaled_bias(scene: Scene) -> Changes:
    """As PEFT 0.14 and 0.15 wrote it."""
    names = {f"{module}.bias": f"{module}.lora_B.bias" for module in scene.modules}
    return {
        name: (scene.base[name].float() + scene.factors[key].float()).to(scene.base[name].dtype)
        for name, key in names.items()
    }


def single_delta(scene: Scene) -> Changes:
    """As LoRA has it, and the unmerged forward of PEFT has not."""
    module = "mha.out_proj"
    scene = Scene(scene.base, scene.merged, scene.factors, {**scene.config, "lora_alpha": 11})
    return {f"{module}.weight": scene.added(f"{module}.weight", scene.scale)}


def head_of_the_base(scene: Scene) -> Changes:
    """A head written out beside the embedding it is tied to, without what the adapter did to it."""
    return {"lm_head.weight": scene.base["model.embed_tokens.weight"]}


def base_in_the_place_of_the_carried(scene: Scene) -> Changes:
    """Both deltas on the embedding of the base, where the adapter file carries another one."""
    name = "model.embed_tokens.weight"
    head = scene.factors["lm_head.lora_B.weight"].float() @ scene.factors["lm_head.lora_A.weight"].float()
    first = scene.added(name, scene.scale)
    return {name: (first.float() + scene.scale * head).to(first.dtype)}


ROOT_R = 5**0.5
MISTAKES: Mapping[str, tuple[Mistake, set[str]]] = {
    "llama-qv": (base_kept(r"layers\.1\..*(q|v)_proj"), {"LC502"}),
    "llama-all-seven": (base_kept("k_proj"), {"LC501"}),
    "llama-tied-embed": (base_kept("embed_tokens"), {"LC501"}),
    "llama-tied-head": (head_of_the_base, {"LC101"}),
    "llama-tied-both": (dropped("model.embed_tokens.weight"), {"LC201"}),
    "llama-tied-carried": (base_in_the_place_of_the_carried, {"LC403"}),
    "llama-untied-embed-head": (base_kept("lm_head"), {"LC501"}),
    "llama-rslora": (lambda scene: scaled(lambda c: 7 / 5)(scene) | scaled_v(scene), {"LC107"}),
    "llama-patterns": (without_patterns, {"LC109"}),
    "llama-patterns-unsorted": (without_patterns, {"LC109"}),
    "llama-bias-all": (base_kept(r"\.bias$"), {"LC403"}),
    "llama-bias-lora-only": (biases_added, {"LC410"}),
    "llama-saved-head": (base_kept("lm_head"), {"LC403"}),
    "llama-saved-norm-and-embed": (base_kept(r"^model\.norm"), {"LC403"}),
    "llama-trainable-tokens": (base_kept("embed_tokens"), {"LC403"}),
    "llama-tied-trainable-tokens": (rows_added, {"LC410"}),
    "llama-dora": (without_magnitude, {"LC106"}),
    "llama-two-adapters": (base_kept("up_proj"), {"LC501"}),
    "gpt2": (transposed, {"LC104"}),
    "gpt2-dora": (without_magnitude, {"LC106"}),
    "bert-classifier": (dropped("classifier.weight"), {"LC201"}),
    "bert-headless-base": (scaled(lambda c: -c["lora_alpha"] / c["r"]), {"LC103"}),
    "linear-bias-lora": (unscaled_bias, {"LC114"}),
    "conv1d": (one_bit("bn.num_batches_tracked"), {"LC401"}),
    "conv2d": (scaled(lambda c: c["lora_alpha"]), {"LC108"}),
    "conv3d": (twice, {"LC102"}),
    "conv-dora": (base_kept(r"(one|two|three|one_by_one)(_d)?\.weight"), {"LC101"}),
    "embedding": (delta_only, {"LC105"}),
    "embedding-dora": (without_magnitude, {"LC106"}),
    "mha": (single_delta, {"LC110"}),
    "square": (transposed, {"LC104"}),
    "adapter-bf16": (extra, {"LC202"}),
    "adapter-bin": (not_a_number, {"LC130"}),
    "sharded": (base_kept(r"layers\.0\."), {"LC502"}),
    "fp16-base": (through_bf16, {"LC120"}),
    "low-cpu-mem": (scaled(lambda c: 1.25 * c["lora_alpha"] / c["r"]), {"LC110"}),
    "no-autocast": (one_element, {"LC199"}),
    "cast-base": (reshaped, {"LC203"}),
    "carried-base": (base_kept("up_proj"), {"LC403"}),
}
"""The mistake that suits each world, and the code that must be told."""


def scaled_v(scene: Scene) -> Changes:
    """alpha / r of the v_proj of the rsLoRA world, whose rank is 3."""
    return {name: scene.added(name, 7 / 3) for name in scene.targets if "v_proj" in name}


@pytest.fixture
def spoil(world, load, save):
    """(world, dtype) -> its inputs with the merged file as its mistake leaves it, and the codes that must be told."""

    def make(name: str, dtype: str):
        inputs = world(name, dtype)
        merged = load(inputs.merged)
        prefix = peft_worlds.RECIPES[name].base_prefix
        plain = {prefix + key: one for key, one in load(inputs.base).items()}
        base = {key: one.to(merged[key].dtype) if key in merged else one for key, one in plain.items()}
        factors = {
            key.removeprefix("base_model.model.").replace(".base_layer", ""): one
            for key, one in load(inputs.adapters[0]).items()
        }
        config = json.loads((inputs.adapters[0] / "adapter_config.json").read_text())
        mistake, codes = MISTAKES[name]
        wanted = mistake(Scene(base, merged, factors, config))
        changes = {
            key: one for key, one in wanted.items() if one is None or key not in merged or not same(one, merged[key])
        }
        assert changes
        state = {key: one for key, one in {**merged, **changes}.items() if one is not None}
        return inputs.but(merged=save(state, inputs.merged)), codes, {key for key in changes if key in merged}

    return make


def same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pair = (x.contiguous().view(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(*pair)


def test_every_world_has_its_mistake() -> None:
    assert list(MISTAKES) == peft_worlds.names()


@pytest.mark.parametrize("case", UNSAFE, ids=ident)
def test_the_mistake_of_each_world_is_refuted_and_named(spoil, case) -> None:
    inputs, codes, _ = spoil(*case)
    report = lora_check.check(*inputs.args, jobs=1)
    assert report.verdict.value == "refuted"
    assert report.exit_code == 1
    assert codes <= {one.code for one in report.findings}


@pytest.mark.parametrize("case", UNSAFE, ids=ident)
def test_nothing_but_the_spoilt_tensors_is_refuted(spoil, case) -> None:
    inputs, _, changed = spoil(*case)
    report = lora_check.check(*inputs.args, jobs=1)
    refuted = {one.tensor for one in report.comparisons if one.verdict.value == "refuted"}
    if case[0] == "llama-tied-head":
        changed = {"lm_head.weight"}
    gone = {name for name in changed if name not in {one.tensor for one in report.comparisons}}
    assert refuted == changed - gone


AT_THE_COMMAND_LINE = [
    ("llama-qv", "bf16"),
    ("llama-all-seven", "fp32"),
    ("llama-tied-both", "bf16"),
    ("llama-rslora", "bf16"),
    ("llama-bias-all", "fp32"),
    ("llama-saved-head", "fp16"),
    ("llama-dora", "bf16"),
    ("gpt2", "fp32"),
    ("conv1d", "bf16"),
    ("embedding", "fp32"),
    ("adapter-bf16", "bf16"),
    ("adapter-bin", "fp32"),
    ("fp16-base", "fp16"),
    ("cast-base", "bf16"),
]


@pytest.mark.parametrize("case", AT_THE_COMMAND_LINE, ids=ident)
def test_the_command_line_says_the_same_with_its_exit_code(world, spoil, case, tmp_path, capsys) -> None:
    broken, codes, _ = spoil(*case)
    for inputs, code, verdict in ((world(*case), 0, "verified"), (broken, 1, "refuted")):
        file = tmp_path / f"{verdict}.json"
        assert main(["report", *inputs.argv, "--json", str(file)]) == code
        out, err = capsys.readouterr()
        assert out.startswith(f"{verdict}: ")
        assert err == ""
        told = json.loads(file.read_text())
        assert (told["verdict"], told["exit_code"]) == (verdict, code)
        listed = {one["code"] for one in told["findings"]}
        assert codes <= listed if code else not codes & listed
        assert all(one in out for one in codes) == bool(code)
