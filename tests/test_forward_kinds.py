"""`forward` over models of every kind, weighted and combined adapters, and what must not be read as agreement."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import forward_worlds as worlds
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_check.__main__ import main
from lora_check.errors import InputError, UsageError
from lora_check.forwarding.bounds import Noise
from lora_check.forwarding.line import forward
from lora_check.forwarding.measures import pair
from lora_check.forwarding.nouns import Forward, Said
from lora_check.forwarding.pages import markdown, text
from lora_check.forwarding.prompts import Questions, questions
from lora_check.oracles.expecting import expect
from lora_check.oracles.lockstep import replayed
from lora_check.oracles.manners import quiet
from lora_check.oracles.recording import recorded
from lora_check.report import Style
from lora_check.types import Verdict

IDS = tuple(
    (*torch.randint(3, 60, (11,), generator=torch.Generator().manual_seed(seed)).tolist(), 2) for seed in (0, 1)
)


def run(folders: worlds.Folders, merged: str | Path | None = None, **options: Any) -> Forward:
    asked = {"tokens": 3, "jobs": 1, **options}
    wanted = Questions(ids=asked.pop("ids", IDS))
    return forward(folders.base, list(folders.adapters), str(merged or folders.merged), wanted, **asked)


@pytest.fixture(scope="module")
def sort(tmp_path_factory):
    """The folders of a sort, made once."""
    known = {}

    def get(name: str) -> worlds.Folders:
        if name not in known:
            known[name] = worlds.made(name, tmp_path_factory.mktemp("sorts"))
        return known[name]

    return get


def unapplied(folders: worlds.Folders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders.base, tmp_path / "unapplied"))


# -------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("name", worlds.SORTS)
def test_every_kind_agrees_and_with_the_base_in_the_place_of_merged_departs_first_where_it_is_adapted(
    sort, name, tmp_path
) -> None:
    folders = sort(name)
    found = run(folders)
    assert (found.answer, found.verdict, found.lockstep.departures) == ("agrees", Verdict.VERIFIED, ())
    assert found.lockstep.idle == ()
    rounded = found.pairs[0].logit_max
    found = run(folders, unapplied(folders, tmp_path), tokens=0)
    assert (found.answer, found.verdict) == ("departs", Verdict.REFUTED)
    assert (found.first.place, found.first.share) == (worlds.SORTS[name].first, pytest.approx(0, abs=1e-3))
    told = {one.other: one for one in found.pairs if one.one == "merged"}
    assert told["base"].exact
    assert told["unmerged"].logit_max > 50 * rounded


def answers(folders: worlds.Folders, name: str, ids: tuple[int, ...]) -> Any:
    with worlds.expected(), quiet():
        base = worlds.load(folders.base, worlds.SORTS[name].cls)
        return PeftModel.from_pretrained(base, folders.adapters[0]).eval()(input_ids=torch.tensor([ids]))


def test_what_is_compared_is_what_peft_answers(sort) -> None:
    for name, key in (("masked", "logits"), ("sequences", "logits"), ("hidden", "last_hidden_state")):
        said = run(sort(name)).said["unmerged"].logits[0]
        assert torch.equal(said, answers(sort(name), name, IDS[0])[key].reshape(said.shape)), name


def test_what_is_no_distribution_has_neither_kl_nor_agreement_and_nothing_talks_but_what_can(sort) -> None:
    for name, chances in (("masked", True), ("sequences", True), ("one number", False), ("hidden", False)):
        found = run(sort(name))
        (ours, *_) = found.pairs
        assert {one is not None for one in (ours.kl_mean, ours.kl_max, ours.agreement)} == {chances}, name
        assert (found.perplexities, found.spoken, found.said["merged"].new) == ({}, {}, ())
        assert any("no continuations, no perplexity" in line for line in found.remarks)
        for page in (text(found, Style()), markdown(found, Style())):
            assert ("KL" in page) is chances
            assert "sampling" not in page


def test_an_encoder_decoder_reads_one_half_and_is_scored_on_the_other_as_its_own_loss_is(sort) -> None:
    folders = sort("t5")
    found = run(folders)
    model = worlds.load(folders.merged, "T5ForConditionalGeneration")
    lost = []
    with torch.no_grad():
        for ids in IDS:
            first, second = torch.tensor([ids[:6]]), torch.tensor([ids[6:]])
            lost.append(model(input_ids=first, labels=second).loss.item())
        alone = model.generate(torch.tensor([IDS[0]]), do_sample=False, max_new_tokens=3)
    assert found.perplexities["merged"] == pytest.approx(math.exp(sum(lost) / 2), rel=1e-6)
    assert found.said["merged"].new[0] == tuple(alone[0, 1:].tolist())
    assert "perplexity of the second half of the text after the first" in text(found, Style())


def test_roberta_has_fewer_positions_than_rows_for_them(sort) -> None:
    found = run(sort("sequences"), ids=(tuple(3 + i % 50 for i in range(50)),))
    assert [(len(one.ids), one.cut) for one in found.asked] == [(32, 18)]
    assert found.answer == "agrees"


def test_a_head_that_the_adapter_brings_is_compared_and_one_that_nobody_brings_is_not(tmp_path) -> None:
    sizes = {**worlds.BERT, "num_labels": 3}
    with worlds.expected(), quiet():
        whole = worlds.new("BertForSequenceClassification", sizes)
        whole.bert.save_pretrained(tmp_path / "base")
        adapter = worlds.train(whole, tmp_path / "adapter", ("query",), task_type="SEQ_CLS")
        bare = worlds.load(tmp_path / "base", "BertForSequenceClassification", num_labels=3)
        PeftModel.from_pretrained(bare, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    folders = worlds.Folders(str(tmp_path / "base"), (adapter,), str(tmp_path / "merged"))
    found = run(folders)
    assert (found.answer, found.verdict) == ("agrees", Verdict.VERIFIED)
    assert any("BASE is BertModel and is run as BertForSequenceClassification" in one for one in found.remarks)
    assert any("classifier.weight, which the adapter brings" in line for line in found.remarks)
    assert all(one.other != "base" for one in found.pairs)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"task_type": None, "modules_to_save": None})
    )
    headless = run(folders)
    assert headless.answer == "undecided"
    assert headless.verdict is not Verdict.VERIFIED


# ------------------------------------------------------------------------------------- weights and combinations

WEIGHTS = (0.5, 2.0)


def weighted(model: PeftModel) -> PeftModel:
    for layer in (one for one in model.modules() if isinstance(getattr(one, "scaling", None), dict)):
        for name, weight in zip(("one", "two"), WEIGHTS, strict=True):
            if name in layer.scaling:
                layer.scaling[name] *= weight
    return model.merge_and_unload(adapter_names=["one", "two"])


def combined(kind: str, **options: Any):
    def merge(model: PeftModel) -> PeftModel:
        model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type=kind, **options)
        model.set_adapter("both")
        return model.merge_and_unload()

    return merge


def test_weights_are_those_of_the_report_and_none_or_others_depart(tmp_path, capsys) -> None:
    folders = worlds.two(tmp_path, weighted, ranks=(3, 4))
    assert run(folders, weights=WEIGHTS).verdict is Verdict.VERIFIED
    for wrong in (None, (2.0, 0.5)):
        found = run(folders, weights=wrong)
        assert (found.answer, found.verdict) == ("departs", Verdict.REFUTED)
    (tmp_path / "ids").write_text("3 4 5\n")
    argv = [folders.base, *folders.adapters, folders.merged, "--ids", str(tmp_path / "ids")]
    assert main(["forward", *argv, "--tokens", "1", "--weights", "0.5", "2"]) == 0
    assert "weights 0.5 2, dtype float32" in capsys.readouterr().out


KINDS = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_combination_agrees_under_its_own_kind_and_under_no_other(kind, tmp_path) -> None:
    options = KINDS[kind]
    folders = worlds.two(tmp_path, combined(kind, **options))
    named = ":".join([kind, *(f"{key}={value}" for key, value in options.items())])
    found = run(folders, weights=WEIGHTS, combination=named)
    assert (found.answer, found.verdict) == ("agrees", Verdict.VERIFIED)
    assert found.circumstances["adapters"] == f"combined by {named}"
    other = run(folders, weights=WEIGHTS, combination="cat" if kind == "linear" else "linear")
    assert other.answer == "undecided"
    assert other.verdict is Verdict.REFUTED


def test_a_random_combination_has_no_unmerged_model_and_an_unknown_one_is_none(tmp_path) -> None:
    folders = worlds.two(tmp_path, combined("linear"))
    with pytest.raises(UsageError, match="no unmerged model for --combination dare_ties"):
        run(folders, combination="dare_ties")
    with pytest.raises(UsageError, match="'wat' is no combination"):
        run(folders, combination="wat")


def test_factors_that_only_the_second_adapter_lacks_are_made_up_and_decide_nothing(tmp_path) -> None:
    folders = worlds.two(tmp_path, lambda model: model.merge_and_unload(adapter_names=["one", "two"]))
    assert run(folders).answer == "agrees"
    file = Path(folders.adapters[1]) / "adapter_model.safetensors"
    kept = {name: one for name, one in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    found = run(folders)
    assert found.answer == "undecided"
    assert found.verdict is not Verdict.VERIFIED
    assert any("PEFT left them as they were drawn" in line for line in found.remarks)


# ------------------------------------------------------------------------------------- what is no agreement


class Layers(nn.Module):
    """Two layers, one of which nobody calls, and a dropout that is never called either."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 5), nn.Linear(6, 5)
        self.quiet = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def stepped(dtype: torch.dtype, size: float, change: float = 0.0):
    """(lockstep of a merge by PEFT whose first weight is then changed, by so much)"""
    torch.manual_seed(0)
    base = Layers().to(dtype)
    base.used.weight.data.fill_(size)
    tuned = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["used", "unused"])).eval()
    worlds.randomise(tuned, 0.1, lambda name: "lora_" in name)
    x = torch.full((1, 6), 200.0, dtype=dtype)

    def run(model: Any, given: torch.Tensor) -> torch.Tensor:
        return model(given)

    with torch.no_grad():
        record = recorded(tuned, [x], run)
        expect(record, Noise(storage=str(dtype).removeprefix("torch."), stores=1))
        merged = tuned.merge_and_unload()
        merged.used.weight[0, 0] += change
        return replayed(merged, [x], run, record, narrower=False)


def test_a_module_that_no_token_reaches_is_counted_apart() -> None:
    found = stepped(torch.float32, 1.0)
    assert (found.modules, found.idle, found.answer) == (1, ("unused",), "agrees")


def test_where_the_unmerged_model_overflows_nothing_is_refuted_and_nothing_agrees_that_is_not_the_same() -> None:
    assert stepped(torch.float16, 1.0, change=0.5).answer == "departs"
    assert stepped(torch.float16, 60.0).answer == "agrees"
    found = stepped(torch.float16, 60.0, change=-120.0)
    assert [one.sure for one in found.departures] == [False]
    assert found.answer == "undecided"


def test_bf16_that_was_stored_in_fp16_has_lost_its_smallest_numbers_and_is_not_refuted_for_that(tmp_path) -> None:
    with worlds.expected(), quiet():
        base = worlds.new("BertForMaskedLM", worlds.BERT)
        base.bert.embeddings.word_embeddings.weight.data[:, ::3] *= 1e-6
        base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
        adapter = worlds.train(base, tmp_path / "adapter", ("query",))
        half = worlds.load(tmp_path / "base", "BertForMaskedLM", dtype=torch.float16)
        PeftModel.from_pretrained(half, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    folders = worlds.Folders(str(tmp_path / "base"), (adapter,), str(tmp_path / "merged"))
    assert run(folders).answer == "agrees"
    found = run(folders, dtype="float32")
    assert (found.answer, found.first.place) == ("undecided", "bert.embeddings.word_embeddings")


def test_numbers_that_are_no_numbers_are_not_passed_over() -> None:
    spoilt = torch.zeros(3, 4)
    spoilt[1, 2] = math.nan
    told = pair(("a", "b"), Said(logits=(spoilt,)), Said(logits=(torch.zeros(3, 4),)))
    assert all(math.isnan(one) for one in (told.kl_mean, told.kl_max, told.logit_max))
    masked = torch.tensor([[0.0, -math.inf, 1.0]])
    told = pair(("a", "b"), Said(logits=(masked,)), Said(logits=(masked.clone(),)))
    assert (told.kl_mean, told.kl_max, told.logit_max) == (0, 0, 0)


# ----------------------------------------------------------------------------------------------------- bad input


def changed(folders: worlds.Folders, tmp_path: Path, **keys: Any) -> Path:
    out = Path(shutil.copytree(folders.merged, tmp_path / "changed"))
    told = json.loads((out / "config.json").read_text()) | keys
    (out / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return out


OWN = {"AutoModel": "modeling_own.Own"}
CONFIGS = {
    "code of its own": ({"model_type": "own", "auto_map": OWN}, "model_type 'own', which transformers does not have"),
    "a class of its own": ({"architectures": ["OwnModel"], "auto_map": OWN}, "is OwnModel, which transformers does"),
    "no list of names": ({"architectures": [3]}, r"names \[3\] as architectures"),
    "a class of another type": ({"architectures": ["GPT2LMHeadModel"]}, "names the model_type bert and the class GPT2"),
    "a head less": ({"architectures": ["BertModel"]}, "is BertModel, whose answers differ in kind"),
    "an answer of two": ({"architectures": ["BertForQuestionAnswering"]}, "answers what forward cannot compare"),
    "no type": ({"model_type": None}, "tells no model_type"),
    "a type that is no word": ({"model_type": ["bert"]}, "is of model_type"),
    "an impossible size": ({"hidden_size": "wide"}, "could not load the merged model"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_cannot_be_run_is_told_in_one_sentence_and_nothing_of_it_is_executed(
    sort, name, tmp_path
) -> None:
    keys, says = CONFIGS[name]
    out = changed(sort("masked"), tmp_path, **keys)
    (out / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match=says):
        run(sort("masked"), out)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_is_no_change_of_weights_is_refused(tmp_path) -> None:
    folders = worlds.two(tmp_path, weighted)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with worlds.expected():
        get_peft_model(worlds.load(folders.base, "LlamaForCausalLM"), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(InputError, match=r"is of type PROMPT_TUNING, which PEFT cannot merge"):
        run(worlds.Folders(folders.base, (str(tmp_path / "prompt"),), folders.merged))


def pruned(root: Path) -> worlds.Folders:
    """A Llama and an AdaLoRA of which the allocator left v_proj of the first layer no rank."""
    model = worlds.new("LlamaForCausalLM", worlds.LLAMA)
    model.save_pretrained(root / "base")
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, total_step=10, target_modules=["q_proj", "v_proj"])
    with quiet():
        tuned = get_peft_model(model, config)
        worlds.randomise(tuned, 0.3, lambda name: "lora_" in name and "ranknum" not in name)
        places = [name.removesuffix(".default") for name, _ in tuned.named_parameters() if ".lora_E." in name]
        first = "model.layers.0.self_attn.v_proj"
        kept = {name.removeprefix("base_model.model."): [first not in name] * 3 + [False] for name in places}
        tuned.peft_config["default"].rank_pattern = {f"{name}.default": ranks for name, ranks in kept.items()}
        tuned.save_pretrained(root / "adapter")
        unmerged = PeftModel.from_pretrained(worlds.load(root / "base", "LlamaForCausalLM"), root / "adapter")
        unmerged.merge_and_unload().save_pretrained(root / "merged")
    assert 0 in {x.numel() for x in load_file(root / "adapter" / "adapter_model.safetensors").values()}
    return worlds.Folders(str(root / "base"), (str(root / "adapter"),), str(root / "merged"))


def test_factors_that_are_no_modules_run_too_and_where_none_are_left_nothing_departs(tmp_path, capfd) -> None:
    folders = pruned(tmp_path)
    found = run(folders)
    assert (found.answer, found.verdict, found.lockstep.departures) == ("agrees", Verdict.VERIFIED, ())
    wrong = shutil.copytree(folders.merged, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.5
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    found = run(folders, wrong, tokens=0)
    assert (found.answer != "agrees", found.verdict) == (True, Verdict.REFUTED)
    assert found.first.place == "model.layers.1.self_attn.q_proj"
    capfd.readouterr()
    assert main(["parity", folders.base, *folders.adapters]) == 0  # PEFT takes the lists of ranks for LoRA's
    assert capfd.readouterr().err == ""


def test_what_cannot_be_run_is_told_of_the_adapter_and_not_of_the_base(sort, monkeypatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise ValueError("a first line:\n\n  and what it announces\nand more")

    folders = sort("hidden")
    monkeypatch.setattr("lora_check.oracles.recording.recorded", crash)
    with pytest.raises(InputError) as told:
        run(folders)
    assert told.value.message == f"could not run unmerged {folders.adapters[0]}: a first line: and what it announces"


def test_code_beside_a_class_that_transformers_has_is_told_and_not_run(sort, tmp_path) -> None:
    out = changed(sort("masked"), tmp_path, auto_map={"AutoModelForMaskedLM": "modeling_own.Own"})
    (out / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    found = run(sort("masked"), out)
    assert found.answer == "agrees"
    says = "code of its own, which is never run: it is run as transformers' own BertForMaskedLM"
    assert any(says in line for line in found.remarks)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_generation_configuration_is_no_silence_and_defaults_are_no_difference(sort, tmp_path) -> None:
    out = changed(sort("t5"), tmp_path, dropout_rate=None, layer_norm_epsilon=1e-5)
    assert set(run(sort("t5"), out).differences["config.json"]) == {"layer_norm_epsilon"}
    (out / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"could not read .*generation_config.json"):
        run(sort("t5"), out)


def test_a_tensor_of_another_shape_departs_where_it_lies(sort, tmp_path) -> None:
    out, name = Path(shutil.copytree(sort("masked").merged, tmp_path / "cut")), "bert.encoder.layer.1.output.dense"
    tensors = load_file(out / "model.safetensors")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:-1].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = run(sort("masked"), out)
    assert (found.first.place, found.verdict) == (name, Verdict.REFUTED)
    assert any("of another shape than its class" in line for line in found.remarks)


LINES = {
    "a chat": ("[INST] Hello [/INST]\nand\x0bmore\n\n", ("[INST] Hello [/INST]", "and\x0bmore")),
    "a mark": ("\ufeffone\r\ntwo", ("one", "two")),
    "a list": ('["one\\ntwo", "three"]', ("one\ntwo", "three")),
}


@pytest.mark.parametrize("name", LINES)
def test_prompts_are_lines_or_a_list(name, tmp_path) -> None:
    content, wanted = LINES[name]
    (tmp_path / "prompts").write_text(content, encoding="utf-8")
    assert questions(str(tmp_path / "prompts")).prompts == wanted


def test_one_token_is_enough_for_a_mask_and_too_little_for_a_next_token(sort) -> None:
    assert run(sort("masked"), ids=((5,),), tokens=0).answer == "agrees"
    with pytest.raises(InputError, match="no sequence has two tokens"):
        run(sort("t5"), ids=((5,),), tokens=0)


def test_a_list_that_breaks_off_is_no_line(tmp_path) -> None:
    (tmp_path / "prompts").write_text('["one", "two"')
    with pytest.raises(InputError, match="begins as a JSON list and is none"):
        questions(str(tmp_path / "prompts"))
