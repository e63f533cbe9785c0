"""`forward`: three real models on the same tokens; breakages are PEFT's own, plain torch, or JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.real.merge import merge_adapter
from fixtures.real.models import make_case
from lora_check.__main__ import main
from lora_check.forwarding.line import forward
from lora_check.forwarding.measures import pair, partings, perplexity
from lora_check.forwarding.nouns import Asked, Said
from lora_check.forwarding.pages import text
from lora_check.forwarding.prompts import Questions
from lora_check.oracles.loading import quiet
from lora_check.report import Style
from lora_check.types import Verdict

DEMO = Path(__file__).parents[1] / "lora_check" / "data" / "demo"
BASE, ADAPTER, MERGED = (str(DEMO / name) for name in ("base", "adapter", "merged"))
PROMPTS = ("The keeper of the lighthouse is", "The baker sells")
TEXT = "The ferry leaves at noon and carries only bicycles. The baker sells apple pies and tea in a blue tent."
FILE = "model.safetensors"


def ask(merged: str | Path, base: str = BASE, adapter: str = ADAPTER, **options):
    wanted = Questions(prompts=PROMPTS, text=TEXT)
    return forward(str(base), [str(adapter)], str(merged), wanted, **{"tokens": 4, "jobs": 1, **options})


@pytest.fixture(scope="module")
def honest():
    return ask(MERGED)


def spoilt(out: Path, change, config=None) -> Path:
    """A copy of the merged folder with other tensors or another config.json."""
    shutil.copytree(MERGED, out)
    tensors = load_file(Path(MERGED) / FILE)
    changed = {name: one.clone().contiguous() for name, one in change(tensors).items()}
    save_file(changed, out / FILE, metadata={"format": "pt"})
    if config:
        told = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config(told)))
    return out


def base_tensors() -> dict[str, torch.Tensor]:
    return load_file(Path(BASE) / FILE)


def moved(factor: float, only: str = ""):
    """W + factor * (W' - W) of the targets, added in fp32 and stored once."""
    base = base_tensors()

    def change(tensors):
        return {
            name: (base[name].float() + factor * (one.float() - base[name].float())).to(one.dtype)
            if only in name and "_proj" in name
            else one
            for name, one in tensors.items()
        }

    return change


def as_it_is(tensors):
    return tensors


# ------------------------------------------------------------------------------------------------------ honest


def test_an_honest_merge_computes_what_base_and_adapter_compute(honest) -> None:
    assert (honest.verdict, honest.answer, honest.lockstep.departures) == (Verdict.VERIFIED, "agrees", ())
    assert len(honest.lockstep.arrivals) == 28
    assert all(abs(share - 1) <= budget < 0.1 for share, budget in honest.lockstep.arrivals.values())
    by = {(one.one, one.other): one for one in honest.pairs}
    assert by["merged", "live"].exact
    assert 0 < by["merged", "unmerged"].kl_mean < 0.01 * by["unmerged", "base"].kl_mean
    assert not honest.differences
    assert honest.circumstances["dtype"] == "bfloat16"


def test_the_base_that_shares_its_load_is_the_base_and_so_is_peft_with_its_adapters_disabled(honest) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).eval()
    ids = [torch.tensor([one.ids]) for one in honest.asked]
    with torch.no_grad():
        alone = [model(input_ids=one).logits[0] for one in ids]
        with quiet():
            wrapped = PeftModel.from_pretrained(model, ADAPTER).eval()
        with wrapped.disable_adapter():
            disabled = [wrapped(input_ids=one).logits[0] for one in ids]
        enabled = [wrapped(input_ids=one).logits[0] for one in ids]
    for place, logits in enumerate(alone):
        assert torch.equal(logits, honest.said["base"].logits[place])
        assert torch.equal(logits, disabled[place])
        assert torch.equal(enabled[place], honest.said["unmerged"].logits[place])
        assert not torch.equal(logits, enabled[place])


def test_a_safe_merge_and_one_with_factors_in_bf16_agree_too(tmp_path) -> None:
    for place, how in enumerate(({"safe": True}, {"autocast": False})):
        out = merge_adapter(BASE, ADAPTER, tmp_path / str(place), dtype="bf16", **how)
        assert ask(out, tokens=0).answer == "agrees", how


# ------------------------------------------------------------------------------------------------------ broken


def louder(out: Path, factor: float) -> Path:
    """What PEFT merges with another alpha."""
    adapter = shutil.copytree(ADAPTER, out / "adapter")
    told = json.loads((adapter / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"]) == (6, 10)
    (adapter / "adapter_config.json").write_text(json.dumps(told | {"lora_alpha": factor * 10}))
    return merge_adapter(BASE, adapter, out, dtype="bf16")


FIRST = "model.layers.0.self_attn.q_proj"
BROKEN = {
    "never applied": (lambda out: spoilt(out, moved(0.0)), FIRST, "LC101", 0.0),
    "applied twice": (lambda out: merge_adapter(MERGED, ADAPTER, out, dtype="bf16"), FIRST, "LC102", 2.0),
    "a scale of 1.25": (lambda out: louder(out, 1.25), FIRST, "LC110", 1.25),
    "alpha not divided": (lambda out: louder(out, 6), FIRST, "LC108", 6.0),
    "one layer skipped": (
        lambda out: spoilt(out, moved(0.0, only="layers.2.")),
        "model.layers.2.self_attn.q_proj",
        "LC502",
        0.0,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_merge_departs_first_where_it_was_broken(name, tmp_path) -> None:
    broken, place, code, share = BROKEN[name]
    found = ask(broken(tmp_path / "merged"), tokens=0)
    assert (found.verdict, found.answer) == (Verdict.REFUTED, "departs")
    assert found.first.place == place
    arrived = {one.place: one.share for one in found.lockstep.departures if one.how == "arrival"}
    assert arrived[place] == pytest.approx(share, abs=0.05)
    wanted = 7 if "layer" in name else 28
    assert len(arrived) == wanted
    verdict, *codes = found.weights[place]
    assert verdict == "refuted"
    assert code in codes


def test_a_scale_that_is_wrong_in_one_module_only_departs_there_alone(tmp_path) -> None:
    only = "layers.1.mlp.down_proj"
    found = ask(spoilt(tmp_path / "merged", moved(0.9, only=only)), tokens=0)
    assert {one.place for one in found.lockstep.departures} == {f"model.{only}"}


def stale_head(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].roll(1, 0)}


def test_a_head_untied_with_other_numbers_departs_in_the_head(tmp_path) -> None:
    out = spoilt(tmp_path / "merged", stale_head, lambda told: told | {"tie_word_embeddings": False})
    found = ask(out, tokens=0)
    assert found.first.place == "lm_head"
    assert {one.place for one in found.lockstep.departures} == {"lm_head"}
    assert found.verdict is Verdict.REFUTED
    assert found.differences["config.json"] == {"tie_word_embeddings": (True, False)}


def test_a_head_that_lies_nowhere_is_told_and_nothing_is_verified(tmp_path) -> None:
    out = spoilt(tmp_path / "merged", as_it_is, lambda told: told | {"tie_word_embeddings": False})
    found = ask(out, tokens=0)
    assert found.verdict is not Verdict.VERIFIED
    assert any("lm_head.weight" in line and "random" in line for line in found.remarks)


def test_where_the_base_itself_lacks_its_head_nothing_is_decided(tmp_path) -> None:
    def untied(told):
        return told | {"tie_word_embeddings": False}

    base = shutil.copytree(BASE, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(untied(json.loads((base / "config.json").read_text()))))
    found = ask(spoilt(tmp_path / "merged", as_it_is, untied), base=base, tokens=0)
    assert (found.answer, found.verdict) == ("undecided", Verdict.INCONCLUSIVE)


CONFIGS = {
    "rope_theta": (
        lambda told: told | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        "model.rotary_emb",
        "rope_parameters.rope_theta",
    ),
    "rms_norm_eps": (lambda told: told | {"rms_norm_eps": 0.1}, "model.layers.0.input_layernorm", "rms_norm_eps"),
    "hidden_act": (lambda told: told | {"hidden_act": "relu"}, "model.layers.0.mlp.act_fn", "hidden_act"),
    "heads": (
        lambda told: told | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24},
        "model.rotary_emb",
        "head_dim",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_right_weights_under_another_configuration_depart_and_the_keys_are_told(name, tmp_path) -> None:
    config, place, key = CONFIGS[name]
    found = ask(spoilt(tmp_path / "merged", as_it_is, config), tokens=0)
    assert found.report.verdict is Verdict.VERIFIED
    assert (found.verdict, found.first.place) == (Verdict.REFUTED, place)
    assert key in found.differences["config.json"]
    assert found.weights[place] == () or found.weights[place][0] == "verified"


def test_code_between_modules_that_computes_otherwise_is_told_by_what_it_gives_on(tmp_path, monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    made, models = LlamaAttention.__init__, []

    def init(self, config, layer_idx) -> None:
        made(self, config, layer_idx)
        models.append(config)
        if len({id(one) for one in models}) > 1 and layer_idx == 1:  # the second model that is loaded
            self.scaling = 2 * self.scaling

    monkeypatch.setattr(LlamaAttention, "__init__", init)
    found = ask(MERGED, tokens=0)
    assert (found.first.place, found.first.how, found.answer) == ("model.layers.1.self_attn", "input", "departs")
    assert found.report.verdict is Verdict.VERIFIED


# ------------------------------------------------------------------------------------------------------ numbers


def log_softmax(x: np.ndarray) -> np.ndarray:
    top = x - x.max(-1, keepdims=True)
    return top - np.log(np.exp(top).sum(-1, keepdims=True))


def test_kl_and_perplexity_are_those_of_numpy(honest) -> None:
    one, other = (
        np.concatenate([logits.double().numpy() for logits in honest.said[name].logits]) for name in ("merged", "base")
    )
    p, q = log_softmax(other), log_softmax(one)
    kl = (np.exp(p) * (p - q)).sum(-1)
    told = next(each for each in honest.pairs if (each.one, each.other) == ("merged", "base"))
    assert told.kl_mean == pytest.approx(kl.mean(), rel=1e-9)
    assert told.kl_max == pytest.approx(kl.max(), rel=1e-9)
    assert told.logit_max == np.abs(one - other).max()
    assert told.agreement == pytest.approx((one.argmax(-1) == other.argmax(-1)).mean())
    assert abs((np.exp(q) * (q - p)).sum(-1).mean() - told.kl_mean) > 1e-3  # the other direction is another number
    text, ids = honest.said["merged"].logits[-1], honest.asked[-1].ids
    rows = log_softmax(text.double().numpy())
    lost = [-rows[place, token] for place, token in enumerate(ids[1:])]
    assert honest.perplexities["merged"] == pytest.approx(np.exp(np.mean(lost)), rel=1e-9)


def test_continuations_are_those_of_the_model_alone_and_a_near_tie_is_told_as_one(honest) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(MERGED, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids = torch.tensor([honest.asked[0].ids])
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    assert tuple(alone[0, ids.shape[1] :].tolist()) == honest.said["merged"].new[0]
    one, other = (Said(logits=(), new=(ids,), steps=(torch.tensor(steps),)) for ids, steps in TIED)
    (parted,) = partings(one, other, rounding=True)
    assert (parted.position, parted.tokens, parted.by_rounding) == (1, (2, 0), True)
    assert parted.margins == pytest.approx((0.25, 0.125))
    assert not partings(one, other, rounding=False)[0].by_rounding
    assert partings(one, one, rounding=True) == ()


TIED = (
    ((1, 2), [[0.0, 3.0, 1.0], [1.0, 0.0, 1.25]]),
    ((1, 0), [[0.0, 3.0, 1.0], [1.125, 0.0, 1.0]]),
)


def test_of_equal_logits_nothing_differs_and_without_a_text_there_is_no_perplexity() -> None:
    said = Said(logits=(torch.randn(5, 7),))
    told = pair(("a", "b"), said, said)
    assert (told.kl_mean, told.kl_max, told.logit_max, told.agreement, told.exact) == (0, 0, 0, 1, True)
    assert perplexity(said, [Asked(ids=(1, 2, 3, 4, 5))]) is None
    flat = Said(logits=(torch.zeros(3, 8),))
    assert perplexity(flat, [Asked(ids=(1, 2, 3), goes_on=False)]) == pytest.approx(8)


# ------------------------------------------------------------------------------------------------- other worlds


WORLDS = [
    ("gpt2", "fp32"),
    ("llama-two-adapters", "bf16"),
    ("no-autocast", "fp16"),
    ("llama-saved-head", "fp32"),
    ("cast-base", "bf16"),
]


@pytest.mark.parametrize("case", WORLDS, ids="-".join)
def test_other_worlds_agree_and_with_the_base_in_the_place_of_merged_depart(world, tmp_path, case) -> None:
    inputs = world(*case)
    ids = tuple(tuple(torch.randint(3, 40, (12,), generator=torch.Generator().manual_seed(s)).tolist()) for s in (0, 1))
    adapters = [str(one) for one in inputs.adapters]

    def run(merged):
        return forward(str(inputs.base), adapters, str(merged), Questions(ids=ids), tokens=2, jobs=1)

    assert run(inputs.merged).answer == "agrees"
    found = run(shutil.copytree(inputs.base, tmp_path / "unmerged"))
    assert (found.answer, found.verdict) == ("departs", Verdict.REFUTED)


def test_a_tie_that_only_the_merge_knows_of_departs_though_every_weight_is_as_peft_wrote_it(world) -> None:
    inputs = world("llama-tied-embed", "fp32")
    found = forward(
        str(inputs.base), [str(inputs.adapters[0])], str(inputs.merged), Questions(ids=((3, 9, 4),)), jobs=1
    )
    assert {one.place for one in found.lockstep.departures} == {"lm_head"}
    assert "shares its weight with model.embed_tokens" in text(found, Style())
    assert found.verdict is Verdict.REFUTED


def test_another_tuner_is_measured_too_and_what_is_not_derived_is_never_verified(world, tmp_path) -> None:
    inputs = world("llama-dora", "bf16")
    ids = (tuple(range(3, 15)),)
    found = forward(str(inputs.base), [str(inputs.adapters[0])], str(inputs.merged), Questions(ids=ids), tokens=0)
    assert found.answer == "agrees"
    other = shutil.copytree(inputs.base, tmp_path / "unmerged")
    found = forward(str(inputs.base), [str(inputs.adapters[0])], str(other), Questions(ids=ids), tokens=0)
    assert found.verdict is Verdict.REFUTED
    assert found.answer != "agrees"


# -------------------------------------------------------------------------------------------------- a real model


def test_a_real_decoder_agrees_and_with_one_layer_skipped_departs_there(tmp_path) -> None:
    case = make_case("smollm2-slice", tmp_path, dtype="bf16")
    found = ask(case.merged, base=case.base, adapter=case.adapter, tokens=2)
    assert (found.verdict, found.lockstep.departures) == (Verdict.VERIFIED, ())
    assert next(one for one in found.pairs if (one.one, one.other) == ("merged", "live")).exact
    ours, base = load_file(case.merged / FILE), load_file(case.base / FILE)
    save_file(
        {name: base[name] if ".layers.1." in name else one for name, one in ours.items()},
        case.merged / FILE,
        metadata={"format": "pt"},
    )
    found = ask(case.merged, base=case.base, adapter=case.adapter, tokens=0)
    assert found.first.place == "model.layers.1.self_attn.q_proj"
    assert found.first.share == pytest.approx(0, abs=0.02)
    assert all(one.place.startswith("model.layers.1.") for one in found.lockstep.departures)


# ------------------------------------------------------------------------------------------------ command line


def test_the_command_tells_on_one_screen_in_json_and_in_markdown(tmp_path, capsys) -> None:
    broken, file = spoilt(tmp_path / "merged", moved(0.0, only="layers.2.")), tmp_path / "out.json"
    (tmp_path / "prompts").write_text("The baker sells\n\nThe river runs\n")
    argv = ["forward", BASE, ADAPTER, str(broken), "--prompts", str(tmp_path / "prompts"), "--tokens", "3"]
    code = main([*argv, "--json", str(file), "--output", str(tmp_path / "out.md"), "--format", "markdown"])
    assert (code, *capsys.readouterr()) == (1, "", "")
    told = json.loads(file.read_text())
    assert (told["schema"], told["command"], told["verdict"], told["exit_code"]) == (1, "forward", "refuted", 1)
    assert told["forward"]["first"]["place"] == "model.layers.2.self_attn.q_proj"
    assert told["forward"]["first"]["weight"]["verdict"] == "refuted"
    assert [one["text"] for one in told["forward"]["sequences"][:2]] == ["The baker sells", "The river runs"]
    assert set(told["forward"]["sequences"][0]["new"]) == {"base", "unmerged", "merged"}
    page = (tmp_path / "out.md").read_text()
    assert page.startswith(
        "### refuted: model.layers.2.self\\_attn.q\\_proj is the first module whose output departs: 0.0"
    )
    assert "its weight is refuted: LC502" in page.splitlines()[0]
    assert {line.count("|") for line in page.splitlines() if line.startswith("|")} == {7}


def test_the_text_fits_a_screen(capsys) -> None:
    assert main(["forward", BASE, ADAPTER, MERGED, "--tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("verified: the merged model computes what base and adapters compute, in all 44 modules")
    assert len(out.splitlines()) < 45
    assert "cut to its first 128 tokens" in out


BAD = {
    "both": (["--ids", "IDS", "--prompts", "IDS"], "--ids stands in the place"),
    "no ids": (["--ids", "WORDS"], "no row of token ids"),
    "unknown ids": (["--ids", "HIGH"], "BASE has tokens 0 to 383"),
    "no file": (["--prompts", "/nowhere"], "could not read /nowhere"),
    "no room": (["--tokens", "128"], "no room in a context of 128"),
    "no number": (["--tokens", "-1"], "'-1' is not a whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_question_is_told_in_one_sentence(name, tmp_path, capsys) -> None:
    files = {"IDS": "3 4 5\n", "WORDS": "three\n", "HIGH": "[[3, 384]]"}
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    options, says = BAD[name]
    code = main(["forward", BASE, ADAPTER, MERGED, *(str(tmp_path / o) if o in files else o for o in options)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["llama-qv", "bert-classifier"])
def test_a_base_without_a_tokenizer_is_told(world, capsys, name) -> None:
    assert main(["forward", *world(name, "fp32").argv]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_the_help_imports_neither_torch_nor_peft() -> None:
    probe = (
        "import sys\nfrom lora_check.__main__ import main\nmain(['forward', '--help'])\n"
        "sys.exit(bool({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 the weights are verified" in " ".join(done.stdout.split())
