"""What lies beside the tensors: folders with several checkpoints, indexes, configurations, circumstances."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import corrupt
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_check
from fixtures.faults.tools import adapted, model_of, save, save_adapter
from lora_check import folders, registry
from lora_check.errors import CorruptCheckpointError, WrongInputError
from lora_check.locations import open_checkpoint
from lora_check.types import (
    Adapter,
    AdapterConfig,
    Finding,
    Folder,
    Pairing,
    Plan,
    Site,
    Spare,
    Step,
    TensorMeta,
    Verdict,
)

FAULTS = registry.load("faults")
NAMED = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(float("nan")),
    "c": torch.ones(4, dtype=torch.bfloat16),
}
INDEX = "model.safetensors.index.json"


def looked(folder: Path) -> Folder:
    return folders.look(open_checkpoint(folder, role="merged"))


def split(folder: Path, parts: list[dict[str, torch.Tensor]], *, index: bool = True) -> list[str]:
    """Shards with numbers, as save_pretrained names them; their names."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    if index:
        homes = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        size = sum(one.nbytes for part in parts for one in part.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": homes}))
    return names


HALVES = [{"a": NAMED["a"]}, {"b": NAMED["b"], "c": NAMED["c"]}]


# ------------------------------------------------------------------------------------------------- the folder


def test_a_folder_with_one_file_has_nothing_beside(tmp_path: Path) -> None:
    save_file(NAMED, tmp_path / "model.safetensors")
    torch.save({"lr": 1.0}, tmp_path / "optimizer.bin")
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    assert looked(tmp_path) == Folder(read=("model.safetensors",))


def test_what_has_no_folder_has_nothing_beside(tmp_path: Path) -> None:
    for name in ("model.safetensors", "other.safetensors"):
        save_file(NAMED, tmp_path / name)
    assert looked(tmp_path / "model.safetensors") == Folder()
    assert folders.look(open_checkpoint(NAMED, role="merged")) == Folder()


def test_shards_of_an_older_save_are_one_set(tmp_path: Path) -> None:
    old = split(tmp_path, [{"a": NAMED["a"]}, {"b": NAMED["b"]}, {"c": NAMED["c"]}])
    new = split(tmp_path, HALVES)
    folder = looked(tmp_path)
    assert list(folder.read) == new
    (spare,) = folder.spares
    assert list(spare.files) == old
    assert not spare.rival
    assert spare.differing() == ()
    save_file({"a": -NAMED["a"]}, tmp_path / old[0])
    assert spare.differing() == ("a",)


@pytest.mark.parametrize(
    ("name", "other", "differs"),
    [
        ("b", torch.tensor(float("nan")), False),
        ("b", torch.tensor(1.0), True),
        ("a", torch.arange(6.0), True),
        ("a", torch.arange(6.0).reshape(2, 3).double(), True),
        ("c", torch.ones(4, dtype=torch.bfloat16), False),
        ("z", torch.ones(4), None),
    ],
)
def test_the_same_tensor_is_the_same_bytes(
    tmp_path: Path, name: str, other: torch.Tensor, differs: bool | None
) -> None:
    save_file(NAMED, tmp_path / "model.safetensors")
    save_file({name: other}, tmp_path / "older.safetensors")
    found = looked(tmp_path).spares[0].differing()
    assert found == (None if differs is None else (name,) if differs else ())


def test_a_pickle_beside_is_compared_and_never_run(tmp_path: Path) -> None:
    save_file(NAMED, tmp_path / "model.safetensors")
    torch.save({**NAMED, "a": -NAMED["a"]}, tmp_path / "pytorch_model.bin")
    (spare,) = looked(tmp_path).spares
    assert spare.differing() == ("a",)
    sentinel = tmp_path / "it-ran"
    pickler = next(iter(corrupt.PICKLERS.values()))
    pickler(tmp_path / "pytorch_model.bin", {"w": 1, "x": corrupt.RunsCode(sentinel)})
    assert spare.differing() is None
    assert not sentinel.exists()


def test_a_damaged_file_beside_does_not_end_the_check(tmp_path: Path) -> None:
    save_file(NAMED, tmp_path / "model.safetensors")
    (tmp_path / "older.safetensors").write_bytes(b"nothing")
    (tmp_path / "generation_config.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    folder = looked(tmp_path)
    assert folder.spares[0].differing() is None
    assert folder.template == ""
    assert folder.generation == {}


def test_one_file_and_shards_are_rivals_only_where_the_index_names_them(tmp_path: Path) -> None:
    save_file(NAMED, tmp_path / "model.safetensors")
    split(tmp_path, HALVES)
    (spare,) = looked(tmp_path).spares
    assert spare.rival
    assert spare.differing() == ()
    (tmp_path / INDEX).unlink()
    (spare,) = looked(tmp_path).spares
    assert not spare.rival


def test_indexes_that_name_absent_files_and_sizes(tmp_path: Path) -> None:
    split(tmp_path, HALVES)
    assert looked(tmp_path).total_size == sum(one.nbytes for one in NAMED.values())
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    save_file(NAMED, tmp_path / "model.safetensors")
    folder = looked(tmp_path)
    assert folder.absent == {INDEX: ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")}
    assert folder.total_size is None


def test_an_adapter_is_beside_only_with_its_configuration(tmp_path: Path) -> None:
    save_file(NAMED, tmp_path / "model.safetensors")
    save_file(NAMED, tmp_path / "adapter_model.safetensors")
    assert looked(tmp_path).adapter == ""
    (tmp_path / "adapter_config.json").write_text("{}")
    folder = looked(tmp_path)
    assert folder.adapter == "adapter_model.safetensors"
    assert not folder.spares


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_lies_in_one_of_three_places(tmp_path: Path, name: str) -> None:
    save_file(NAMED, tmp_path / "model.safetensors")
    text = "{{ x }}" if name.endswith("jinja") else json.dumps({"chat_template": "{{ x }}"})
    (tmp_path / name).write_text(text)
    folder = looked(tmp_path)
    assert folder.template == "{{ x }}"
    assert folder.sides == {"a chat template": (name,)}


def test_looking_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split(tmp_path, HALVES)
    torch.save(NAMED, tmp_path / "pytorch_model.bin")
    opened = open_checkpoint(tmp_path, role="merged")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("looking read a pickle"))
    assert len(folders.look(opened).spares) == 1


# ------------------------------------------------------------------------- folders that cannot be one checkpoint


def test_shards_of_two_checkpoints_without_an_index_are_refused(tmp_path: Path) -> None:
    split(tmp_path, [{"a": NAMED["a"]}, {"b": NAMED["b"]}, {"c": NAMED["c"]}], index=False)
    split(tmp_path, HALVES, index=False)
    with pytest.raises(WrongInputError, match="shards of 2 checkpoints, model-\\*-of-00002 and model-\\*-of-00003"):
        open_checkpoint(tmp_path, role="merged")


def test_an_absent_shard_without_an_index_is_no_missing_tensor(tmp_path: Path) -> None:
    names = split(tmp_path, HALVES, index=False)
    assert set(open_checkpoint(tmp_path, role="merged").metas()) == set(NAMED)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CorruptCheckpointError, match=f"is one of 2 parts, and {names[1]} is not there"):
        open_checkpoint(tmp_path, role="merged")


# ---------------------------------------------------------------------------------------------- what loaders do


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right merge by PEFT, with base and adapter."""
    home = tmp_path_factory.mktemp("files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say of each other is not under test
        save(model_of(), home / "base")
        wrapped = adapted(model_of())
        save_adapter(wrapped, home / "adapter")
        save(wrapped.merge_and_unload(), home / "merged")
    return home


def loaded(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        logits: torch.Tensor = model(input_ids=torch.tensor([[3, 5, 7]])).logits.detach()
    return logits


def codes(home: Path, merged: Path) -> set[str]:
    report = lora_check.check(home / "base", home / "adapter", merged, jobs=1)
    return {one.code for one in report.findings if one.severity != "info"}


def test_transformers_puts_an_adapter_beside_the_merge_on_top_of_it(scene: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(scene / "merged", both)
    right = loaded(both)
    assert codes(scene, both) == set()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(scene / "adapter" / file, both)
    assert codes(scene, both) == {"LC010"}
    assert not torch.allclose(loaded(both), right)


def test_transformers_takes_one_file_before_the_shards_of_an_index(scene: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(scene / "merged", both)
    right = loaded(both)
    held = load_file(both / "model.safetensors")
    shards = [{name: one + 1 for name, one in held.items() if ("layers" in name) is inside} for inside in (True, False)]
    split(both, shards)
    assert torch.equal(loaded(both), right)
    assert codes(scene, both) == {"LC009"}
    split(both, [{name: one - 1 for name, one in part.items()} for part in shards])
    same = tmp_path / "same"
    shutil.copytree(both, same)
    split(same, shards)
    assert codes(scene, same) == {"LC009"}
    split(same, [{name: held[name].clone() for name in part} for part in shards])
    assert codes(scene, same) == set()


def test_the_plan_of_a_folder_with_stale_shards_reads_none_of_them(scene: Path, tmp_path: Path) -> None:
    from lora_check import pipeline
    from lora_check.findings import structural

    both = tmp_path / "both"
    shutil.copytree(scene / "merged", both)
    (both / "older.safetensors").write_bytes(b"nothing")
    plan = pipeline.plan(scene / "base", scene / "adapter", both)
    assert [one.code for one in structural(plan)] == ["LC007"]


def test_a_classifier_trained_on_a_causal_model_loses_no_head(scene: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(scene / "base", dtype="auto", num_labels=3)
        wrapped = adapted(model, task_type="SEQ_CLS")
        save_adapter(wrapped, tmp_path / "adapter")
        save(wrapped.merge_and_unload(), tmp_path / "merged")
    report = lora_check.check(scene / "base", tmp_path / "adapter", tmp_path / "merged", jobs=1)
    assert report.verdict is Verdict.VERIFIED
    assert [(one.code, one.tensors) for one in report.findings] == [("LC208", ("lm_head.weight",))]
    # an adapter for a causal model has nothing to say of a classifier
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    report = lora_check.check(scene / "base", tmp_path / "adapter", tmp_path / "merged", jobs=1)
    assert report.verdict is Verdict.REFUTED


# ------------------------------------------------------------------------------------------------ plans by hand


def meta(name: str, shape: tuple[int, ...] = (96, 48), dtype: str = "bfloat16", codes: str = "") -> TensorMeta:
    return TensorMeta(name=name, shape=shape, dtype=dtype, codes=codes)


def metas(*given: TensorMeta) -> dict[str, TensorMeta]:
    return {one.name: one for one in given}


EMBED, Q, NORM = meta("model.embed_tokens.weight"), meta("q_proj.weight", (64, 48)), meta("norm.weight", (48,))
PLAIN = metas(EMBED, Q, NORM)
CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96}
HEALTHY = Plan(pairings=(), base_metas=PLAIN, merged_metas=PLAIN, base_config=CONFIG, merged_config=CONFIG)
MINE = ("LC007", "LC010", "LC011", "LC012", "LC013", "LC014", "LC015", "LC016", "LC211", "LC212", "LC213", "LC315")


def detect(code: str, plan: Plan) -> tuple[Finding, ...]:
    fault = FAULTS[code]
    seen = fault.detect(plan, ()) if code in ("LC008", "LC009", "LC214") else fault.detect(plan)
    return tuple(seen)


def told(plan: Plan) -> set[str]:
    return {code for code in (*MINE, "LC008", "LC009", "LC316", "LC317") if detect(code, plan)}


def with_config(plan: Plan = HEALTHY, base: Mapping[str, Any] = CONFIG, **changes: Any) -> Plan:
    return replace(plan, base_config=base, merged_config={**base, **changes})


def test_a_healthy_plan_gives_nothing() -> None:
    assert told(HEALTHY) == set()
    assert told(Plan(pairings=())) == set()


def test_a_quantisation_that_only_the_configuration_knows() -> None:
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert told(with_config(quantization_config=four)) == {"LC013"}
    assert told(with_config(quantization={"group_size": 64, "bits": 4})) == {"LC013"}
    assert told(with_config(quantization_config={})) == set()
    # BASE is the same way; or the tensors are quantised; or the dtype is none of plain numbers
    assert told(with_config(base={**CONFIG, "quantization_config": four})) == set()
    for one in (meta("q_proj.weight", codes="bitsandbytes nf4"), meta("q_proj.weight", dtype="float8_e4m3fn")):
        plan = replace(HEALTHY, merged_metas=metas(EMBED, one, NORM))
        assert told(with_config(plan, quantization_config=four)) == set()


def test_a_quantisation_that_the_configuration_does_not_know() -> None:
    plan = replace(HEALTHY, merged_metas=metas(EMBED, meta(Q.name, codes="fp8 in blocks"), NORM))
    (one,) = detect("LC014", plan)
    assert one.tensors == (Q.name,)
    assert "fp8 in blocks" in one.message
    assert told(replace(plan, merged_config={**CONFIG, "gguf": {}})) == set()
    assert told(replace(plan, base_config={}, merged_config={})) == set()


def test_a_configuration_that_computes_something_else() -> None:
    base = {**CONFIG, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "text_config": {"head_dim": 16}}
    (one,) = detect("LC015", with_config(base=base, rope_theta=500000.0))
    assert one.message.endswith("rope_theta 500000.0, 10000.0 in BASE")
    assert one.evidence["changed"] == {"rope_theta": [10000.0, 500000.0]}
    assert detect("LC015", with_config(base=base, text_config={"head_dim": 32}))
    # what only one of them sets, or what only training and saving use
    harmless = {
        "rms_norm_eps": None,
        "hidden_act": "silu",
        "use_cache": False,
        "transformers_version": "5",
        "dtype": "x",
    }
    assert not detect("LC015", with_config(base=base, **harmless))


@pytest.mark.parametrize(
    ("named", "stored", "lossy"),
    [
        ("float16", "bfloat16", True),
        ("bfloat16", "float16", True),
        ("torch.bfloat16", "float32", True),
        ("float32", "bfloat16", False),
        ("bfloat16", "bfloat16", False),
        ("int8", "bfloat16", False),
        (None, "bfloat16", False),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_configuration_that_loads_in_another_dtype(named: str | None, stored: str, lossy: bool, key: str) -> None:
    held = metas(*(replace(one, dtype=stored) for one in PLAIN.values()))
    plan = with_config(replace(HEALTHY, merged_metas=held), **{key: named})
    assert told(plan) == ({"LC016"} if lossy else set())
    same = replace(plan, base_metas=held, base_config=plan.merged_config)
    assert told(same) == set()


def test_another_class_with_other_tensors() -> None:
    lost = replace(HEALTHY, missing=("score.weight",), missing_shapes={"score.weight": (1, 48)})
    other = {**CONFIG, "architectures": ["LlamaForSequenceClassification"]}
    (one,) = detect("LC211", replace(lost, base_config=other))
    says = (
        "MERGED is a LlamaForCausalLM, BASE a LlamaForSequenceClassification: 1 tensor lost, 0 new, 15 kB in, 15 kB out"
    )
    assert one.message == says
    assert one.tensors == ("score.weight",)
    assert not detect("LC202", replace(lost, base_config=other, extra=("x.weight",), extra_shapes={"x.weight": (2, 2)}))
    assert not detect("LC211", lost)
    assert not detect("LC211", replace(HEALTHY, base_config=other))
    # what may only have another name, and what an unmerged model dresses up, is another matter
    renamed = replace(lost, base_config=other, extra=("head.weight",), extra_shapes={"head.weight": (1, 48)})
    assert not detect("LC211", renamed)
    assert not detect("LC211", replace(lost, base_config=other, extra=("score.base_layer.weight",)))


def test_a_vocabulary_of_another_size() -> None:
    assert told(with_config(vocab_size=100)) == {"LC212"}
    nested = {"text_config": {"vocab_size": 96}, "model_type": "vlm"}
    assert told(with_config(base=nested, text_config={"vocab_size": 100})) == {"LC212"}
    # padded rows that BASE has as well, two embeddings, no number
    padded = {**CONFIG, "vocab_size": 90}
    assert told(with_config(base=padded)) == set()
    two = metas(*PLAIN.values(), meta("encoder.embed_tokens.weight"))
    assert told(replace(with_config(vocab_size=100), merged_metas=two)) == set()
    assert told(with_config(vocab_size=None)) == set()


def test_names_that_changed() -> None:
    plan = replace(HEALTHY, renamed={"model.a": "a", "model.b": "b"})
    (one,) = detect("LC213", plan)
    assert one.message == "2 tensors under other names than in BASE: a is model.a"
    assert told(replace(plan, base_config={**CONFIG, "gguf": {}})) == set()


def test_sizes_of_an_index() -> None:
    right = sum(one.nbytes for one in PLAIN.values())
    assert told(replace(HEALTHY, merged_folder=Folder(total_size=right))) == set()
    plan = replace(HEALTHY, merged_folder=Folder(total_size=2 * right))
    assert told(plan) == {"LC012"}
    assert "31 kB" in detect("LC012", plan)[0].message
    coded = replace(plan, merged_metas=metas(meta("q", codes="mxfp4")), merged_config={})
    assert not detect("LC012", coded)


def spare(names: tuple[str, ...] | None, rival: bool) -> Spare:
    return Spare(files=("older.safetensors",), rival=rival, differing=lambda: names)


@pytest.mark.parametrize(
    ("names", "rival", "code"),
    [
        ((), False, None),
        ((), True, None),
        (("a",), False, "LC008"),
        (("a",), True, "LC009"),
        (None, False, None),
        (None, True, "LC009"),
    ],
)
def test_other_weights_are_told_by_whether_they_differ_and_who_takes_them(names: Any, rival: bool, code: Any) -> None:
    plan = replace(HEALTHY, merged_folder=Folder(read=("model.safetensors",), spares=(spare(names, rival),)))
    assert told(plan) == ({"LC007", code} if code else {"LC007"})


def test_what_a_model_is_used_with() -> None:
    base = Folder(read=("m",), sides={"a tokenizer": ("t",)}, generation={"eos_token_id": 2}, template="x")
    same = replace(base, generation={"eos_token_id": 2, "transformers_version": "5"})
    assert told(replace(HEALTHY, base_folder=base, merged_folder=same)) == set()
    # one file, or tensors in memory: nobody knows what lies beside
    assert told(replace(HEALTHY, base_folder=base)) == set()
    bare = Folder(read=("m",))
    (one,) = detect("LC315", replace(HEALTHY, base_folder=base, merged_folder=bare))
    assert one.message == "MERGED lacks a tokenizer"
    assert told(replace(HEALTHY, base_folder=bare, merged_folder=base)) == set()
    other = replace(base, generation={"eos_token_id": [2, 3]}, template="y")
    (one,) = detect("LC315", replace(HEALTHY, base_folder=base, merged_folder=other))
    assert one.message == "changes the chat template and eos_token_id of the generation"


# ------------------------------------------------------------------------- circumstances that weights cannot show


class Nothing:
    location, config = "an adapter", {}

    def metas(self) -> dict[str, TensorMeta]:
        return {}


def adapter(producer: str) -> Adapter:
    config = AdapterConfig(method="LORA", rank=4, alpha=8, producer=producer)
    return Adapter(config=config, checkpoint=Nothing(), dialect="peft", parts=())  # type: ignore[arg-type]


def target(module: str, recipe: str = "lora-linear", *, multihead: bool = False) -> Pairing:
    site = Site(parameter=f"{module}.weight", shape=(8, 8), roles={}, multihead=multihead)
    step = Step(recipe=registry.load("recipes")[recipe], adapter=0, factors={"A": "a", "B": "b"}, site=site)
    return Pairing(merged=meta(f"{module}.weight"), base=meta(f"{module}.weight"), steps=(step,), module=module)


@pytest.mark.parametrize(
    ("config", "producer", "expected"),
    [
        ({"model_type": "gemma3_text"}, "", True),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "peft 0.17.1", True),
        ({"model_type": "gemma3_text"}, "peft 0.18.0", False),
        ({"model_type": "gemma3_text"}, "peft 1.0", False),
        ({"model_type": "llama"}, "", False),
        ({"model_type": "bart", "scale_embedding": True}, "", True),
        ({"model_type": "bart", "scale_embedding": False}, "", False),
    ],
)
def test_an_embedding_whose_output_is_scaled(config: dict[str, Any], producer: str, expected: bool) -> None:
    pairings = (target("model.embed_tokens", "lora-embedding"), target("model.layers.0.q_proj"))
    plan = replace(HEALTHY, pairings=pairings, adapters=(adapter(producer),), base_config=config, merged_config=config)
    found = detect("LC316", plan)
    assert bool(found) == expected
    assert all(one.tensors == ("model.embed_tokens.weight",) for one in found)
    assert not detect("LC316", replace(plan, pairings=pairings[1:]))


def test_layers_whose_weight_a_kernel_takes() -> None:
    modules = [f"backbone.layers.0.mixer.{leaf}" for leaf in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    pairings = tuple(target(one) for one in (*modules, "layers.1.self_attn.out_proj"))
    plan = replace(HEALTHY, pairings=pairings, base_config={"model_type": "mamba"})
    (one,) = detect("LC317", plan)
    assert one.tensors == tuple(f"{module}.weight" for module in modules[1:])
    assert one.evidence["layers"] == ["dt_proj", "out_proj", "x_proj"]
    assert not detect("LC317", replace(plan, base_config={"model_type": "llama"}))
    attention = replace(HEALTHY, pairings=(target("attn.out_proj", multihead=True),))
    assert detect("LC317", attention)
