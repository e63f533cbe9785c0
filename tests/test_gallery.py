"""The gallery: the trainers' formulas against NumPy, one method end to end, and the page of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from fixtures.gallery import __main__ as command
from fixtures.gallery import galore, lora_drop
from fixtures.gallery._extracted import cut, refit
from fixtures.gallery._judging import judged
from fixtures.gallery._kept import made
from fixtures.gallery._methods import methods, prose
from fixtures.gallery._page import anchors, page, ranks
from fixtures.gallery._pairs import Pair, pairs
from fixtures.gallery._training import batch, loss_of, padded, quiet, sample
from fixtures.gallery._tuner import adamw, lora_config
from fixtures.gallery._types import Made, Method, Question, Work
from fixtures.gallery.delta_lora import DeltaLora
from fixtures.gallery.lora_fa import optimiser as lora_fa
from fixtures.gallery.lora_plus import RATIO
from fixtures.gallery.lora_plus import optimiser as lora_plus
from fixtures.training.examples import Example
from fixtures.training.instructions import KINDS, split, stored

ROOT = Path(__file__).parents[1]
SIZES, RANK, SCALE = (7, 5), 3, 10 / 6


def matrix(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def factors() -> Pair:
    out, into = SIZES
    a, b = (matrix(*shape, seed=seed).requires_grad_() for shape, seed in (((RANK, into), 1), ((out, RANK), 2)))
    return Pair(name="layer.q_proj", weight=matrix(out, into, seed=3), a=a, b=b, scale=SCALE)


# -------------------------------------------------------------------------------------------------- Delta-LoRA


@pytest.mark.parametrize(("ratio", "start"), [(0.5, 0), (0.5, 2), (2.0, 1)])
def test_delta_lora_moves_the_weight_by_the_change_of_the_product(ratio: float, start: int) -> None:
    one, x = factors(), matrix(SIZES[1], 4, seed=4)
    weight, a, b = (numbers(tensor) for tensor in (one.weight, one.a, one.b))
    rate, given = 0.01, numbers(x)
    trainer = DeltaLora(torch.optim.SGD([one.a, one.b], lr=rate), [one], ratio=ratio, start=start)
    for step in range(4):
        trainer.zero_grad()
        ((one.weight + one.scale * one.b @ one.a) @ x).square().sum().backward()
        trainer.step()
        outer = 2 * (weight + SCALE * b @ a) @ given @ given.T
        to_a, to_b = SCALE * b.T @ outer, SCALE * outer @ a.T
        before, a, b = b @ a, a - rate * to_a, b - rate * to_b
        if step >= start:
            weight = weight + ratio * SCALE * (b @ a - before)
        np.testing.assert_allclose(numbers(one.weight), weight, rtol=1e-9)
        assert not np.allclose(numbers(one.weight), weight + ratio * SCALE * b @ a)
    assert not np.allclose(weight, numbers(factors().weight)), "the weight has to move"


def test_delta_lora_leaves_the_weight_alone_before_its_start() -> None:
    one = factors()
    trainer = DeltaLora(torch.optim.SGD([one.a, one.b], lr=0.1), [one], ratio=0.5, start=2)
    still = numbers(one.weight)
    for moves in (False, False, True):
        trainer.zero_grad()
        one.a.square().sum().backward()
        trainer.step()
        assert np.array_equal(numbers(one.weight), still) is not moves


# ------------------------------------------------------------------------------------------------------ GaLore


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_the_projection_of_galore_and_its_way_back(shape: tuple[int, int]) -> None:
    gradient = matrix(*shape, seed=5)
    found = galore.projector(gradient, RANK)
    u, values, v = np.linalg.svd(gradient.numpy(), full_matrices=False)
    nearest = (u[:, :RANK] * values[:RANK]) @ v[:RANK]
    assert found.down(gradient).shape == ((RANK, 8) if shape[0] < shape[1] else (8, RANK))
    np.testing.assert_allclose(found.back(found.down(gradient)).numpy(), nearest, atol=1e-12)
    np.testing.assert_allclose((found.basis.T @ found.basis).numpy(), np.eye(RANK), atol=1e-12)
    assert not np.allclose(
        galore.projector(gradient, RANK - 1).back(galore.projector(gradient, RANK - 1).down(gradient)).numpy(), nearest
    )


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_galore_steps_as_adam_in_the_subspace_of_its_gradients(shape: tuple[int, int]) -> None:
    weight, goal = matrix(*shape, seed=6).requires_grad_(), matrix(*shape, seed=7)
    mine, rate, scale, every = numbers(weight), 0.1, 0.25, 2
    trainer = galore.GaLore([weight], rate=rate, rank=RANK, every=every, scale=scale)
    first, second, left = 0.0, 0.0, shape[0] < shape[1]
    for step in range(1, 6):
        trainer.zero_grad()
        (weight - goal).pow(4).sum().backward()
        trainer.step()
        gradient = 4 * (mine - goal.numpy()) ** 3
        if (step - 1) % every == 0:
            u, _, v = np.linalg.svd(gradient)
            # the sign of a singular vector is free; LAPACK gives both libraries the same
            basis = u[:, :RANK] if left else v[:RANK].T
        small = basis.T @ gradient if left else gradient @ basis
        first, second = 0.9 * first + 0.1 * small, 0.999 * second + 0.001 * small**2
        normed = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        mine = mine - rate * scale * (basis @ normed if left else normed @ basis.T)
        np.testing.assert_allclose(numbers(weight), mine, rtol=1e-7, atol=1e-9)
    change = mine - matrix(*shape, seed=6).numpy()
    assert np.linalg.matrix_rank(change) > RANK, "three subspaces add up to more than one of them"


# --------------------------------------------------------------------------------------------------- LoRA-drop


def test_the_importance_of_lora_drop() -> None:
    one, x = factors(), matrix(2, 4, SIZES[1], seed=8)
    a, b, rows = numbers(one.a), numbers(one.b), x.numpy().reshape(-1, SIZES[1])
    wanted = sum(float(np.linalg.norm(SCALE * b @ (a @ row)) ** 2) for row in rows)
    assert lora_drop.output(one, x) == pytest.approx(wanted, rel=1e-12)
    assert lora_drop.output(one, 2 * x) == pytest.approx(4 * wanted, rel=1e-12)
    assert lora_drop.importance({"p": 3.0, "q": 1.0}) == {"p": 0.75, "q": 0.25}
    with pytest.raises(ValueError, match="no factor pair puts out anything"):
        lora_drop.importance({"p": 0.0, "q": 0.0})


def test_lora_drop_keeps_the_largest_until_the_threshold() -> None:
    shares = {"a": 0.1, "b": 0.6, "c": 0.3}
    assert lora_drop.kept(shares, 0.6) == ["b"]
    assert lora_drop.kept(shares, 0.61) == ["b", "c"]
    assert lora_drop.kept(shares, 1.0) == ["b", "c", "a"]
    outputs = {"0.q": 9.0, "1.q": 1.0, "2.q": 0.5, "0.v": 1.0, "1.v": 1.0}
    assert lora_drop.dropped(outputs, 0.8) == {"q": ["1.q", "2.q"], "v": []}


# ------------------------------------------------------------------------------------- tuners of a small Llama


@pytest.fixture
def small() -> object:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 30, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    with quiet():
        return get_peft_model(model, lora_config())


def step(model: object, optimiser: object) -> None:
    ids = torch.arange(20).reshape(2, 10)
    for _ in range(2):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()


def moved(model: object, optimiser: object) -> tuple[bool, bool]:
    """Whether any A moved, and whether every B did."""
    before = [(numbers(one.a), numbers(one.b)) for one in pairs(model)]
    step(model, optimiser)
    after = [(numbers(one.a), numbers(one.b)) for one in pairs(model)]
    differs = [
        [not np.array_equal(was, now) for was, now in zip(*two, strict=True)] for two in zip(before, after, strict=True)
    ]
    return any(a for a, _ in differs), all(b for _, b in differs)


def test_lora_fa_never_moves_a_and_plain_adamw_does(small: object) -> None:
    assert moved(small, adamw(small)) == (True, True)
    assert moved(small, lora_fa(small)) == (False, True)


def test_lora_plus_gives_b_a_larger_rate(small: object) -> None:
    rates = {id(one): group["lr"] for group in lora_plus(small).param_groups for one in group["params"]}
    assert {round(rates[id(one.b)] / rates[id(one.a)], 9) for one in pairs(small)} == {RATIO}
    assert RATIO > 1


def test_lora_drop_shares_the_very_factors(small: object) -> None:
    q = [one.name for one in pairs(small) if one.family == "q_proj"]
    with pytest.raises(ValueError, match="no two layers"):
        lora_drop.share(small, {"q_proj": q[2:], "k_proj": []})
    lora_drop.share(small, {"q_proj": q[1:], "k_proj": []})
    first, second, third = (one for one in pairs(small) if one.family == "q_proj")
    assert second.a is third.a
    assert second.b is third.b
    assert first.a is not second.a
    step(small, torch.optim.SGD([one for one in small.parameters() if one.requires_grad], lr=0.1))
    assert torch.equal(second.b, third.b)
    assert second.b.detach().any()


def test_lora_drop_hears_what_is_no_padding(small: object) -> None:
    step(small, adamw(small))
    ids, heard = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]]), []
    for rows, mask in ((ids, ids != 0), (ids[:1], ids[:1] != 0), (ids[1:, 2:], ids[1:, 2:] != 0), (ids, ids >= 0)):
        with torch.no_grad(), lora_drop.listening(small, mask) as outputs:
            small(input_ids=rows, attention_mask=mask)
        heard.append(outputs)
    both, first, second, with_padding = heard
    assert len(both) == 21
    for name in both:
        assert both[name] == pytest.approx(first[name] + second[name], rel=1e-4)
        assert with_padding[name] != pytest.approx(both[name], rel=1e-4)


# ---------------------------------------------------------------------------------------------- whole and page


def test_a_cut_is_the_nearest_change_of_its_rank() -> None:
    change = matrix(6, 4, seed=9)
    a, b = cut(change, 2, SCALE)
    u, values, v = np.linalg.svd(change.numpy(), full_matrices=False)
    np.testing.assert_allclose((SCALE * b @ a).numpy(), (u[:, :2] * values[:2]) @ v[:2], atol=1e-12)
    assert not np.allclose((SCALE * b @ a).numpy(), change.numpy())


def test_an_adapter_cut_from_a_change_is_that_change(tmp_path: Path) -> None:
    name, config = "model.layers.0.self_attn.q_proj.weight", "adapter_config.json"
    before, low = matrix(7, 5, seed=10).float(), (matrix(7, 2, seed=11) @ matrix(2, 5, seed=12)).float()
    for folder, weight in (("base", before), ("merged", before + low)):
        (tmp_path / folder).mkdir()
        save_file({name: weight, "model.norm.weight": weight[0].clone()}, tmp_path / folder / "model.safetensors")
    out = refit(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter", 2)
    found, told = load_file(out / "adapter_model.safetensors"), json.loads((out / config).read_text())
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    assert set(found) == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    product = found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]
    np.testing.assert_allclose((told["lora_alpha"] / told["r"] * product).numpy(), low.numpy(), atol=1e-5)
    assert not np.allclose(product.numpy(), low.numpy(), atol=1e-2), "the scale has to matter"


# ---------------------------------------------------------------------------------------------- data and whole


def test_the_sample_has_the_shortest_row_of_every_kind() -> None:
    every = {kind for half in KINDS.values() for kind in half}
    taken = sample()
    assert [row["kind"] for row in taken] == list(dict.fromkeys(row["kind"] for row in taken))
    assert {row["kind"] for row in taken} == every
    held_out = split(stored())[1]
    for row in taken:
        assert row not in held_out
        of_kind = [one for one in split(stored())[0] if one["kind"] == row["kind"]]
        assert min(len("".join(one.values())) for one in of_kind) == len("".join(row.values()))


def test_the_loss_of_a_batch_is_that_of_the_answers(small: object) -> None:
    rng = np.random.default_rng(13)
    examples = [
        Example(ids=tuple(rng.integers(1, 30, size).tolist()), start=at) for size, at in ((9, 5), (4, 2), (6, 3))
    ]
    logs = []
    with torch.no_grad():
        found = small(**padded(examples, 0)).loss.item()
        for one in examples:
            told = small(input_ids=torch.tensor([one.ids])).logits.double().log_softmax(-1)[0]
            logs.append([told[place - 1, one.ids[place]].item() for place in range(len(one.ids))])
    answers = [part for one, parts in zip(examples, logs, strict=True) for part in parts[one.start :]]
    assert found == pytest.approx(-np.mean(answers), rel=1e-5)
    assert found != pytest.approx(-np.mean([part for parts in logs for part in parts[1:]]), rel=1e-5)


DEMO = ROOT / "lora_check/data/demo/base"
VERDICTS = {
    "adalora": "verified",
    "delta-lora": "refuted verified",
    "dora": "verified",
    "full": "refuted",
    "galore": "refuted",
    "lora": "verified",
    "lora-drop": "verified",
    "lora-fa": "verified",
    "lora-plus": "verified",
    "pissa": "verified inconclusive verified refuted",
    "qlora": "refuted verified verified verified refuted",
    "rslora": "verified",
    "vera": "verified",
}


@pytest.mark.parametrize("name", list(methods()))
def test_each_method_end_to_end_on_the_demo_model(name: str, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    found = judged(methods()[name], Work(base=DEMO, folder=tmp_path / name, steps=5))
    assert " ".join(one["verdict"] for one in found["answers"]) == VERDICTS[name]
    assert found["loss"] < loss_of(DEMO, batch(DEMO))
    assert all(one["lines"][0].startswith(one["verdict"]) for one in found["answers"])


def test_a_folder_that_is_kept_is_trained_once(tmp_path: Path) -> None:
    trained = []

    def make(work: Work) -> Made:
        trained.append(work)
        adapter, merged = work.folder / "adapter", work.folder / "merged"
        merged.mkdir(parents=True)
        asked = (Question(says="the merge", base=work.base, adapter=adapter, merged=merged),)
        return Made(trained=len(trained), merged=merged, questions=asked)

    method = Method(name="some", title="Some", trains="A", merge="W", make=make)
    work = Work(base=tmp_path / "base", folder=tmp_path / "room/some", steps=1)
    first = made(method, work)
    assert made(method, work) == first
    assert trained == [work]
    assert [one.resolve() for one in (first.questions[0].base, first.merged)] == [work.base, work.folder / "merged"]
    (work.folder / "made.json").unlink()
    (work.folder / "half").touch()
    assert made(method, work).trained == 2
    assert not (work.folder / "half").exists(), "what was never finished is made anew"


def test_every_method_has_its_words() -> None:
    assert len(methods()) == 13
    for name, method in methods().items():
        assert method.name == name
        assert "https://arxiv.org/abs/" in prose(name) or name == "full"
    assert len({one.title for one in methods().values()}) == 13


def test_headings_that_look_alike_have_links_of_their_own() -> None:
    assert anchors(["LoRA", "Full fine-tuning", "LoRA+", "LoRA-FA"]) == {
        "LoRA": "lora",
        "Full fine-tuning": "full-fine-tuning",
        "LoRA+": "lora-1",
        "LoRA-FA": "lora-fa",
    }


def test_ranks_in_words() -> None:
    assert ranks({"ranks": {"low-rank": [6]}, "hidden": 0, "untold": 0}) == "6"
    assert ranks({"ranks": {"low-rank": [2, 4, 10]}, "hidden": 3, "untold": 0}) == "2 to 10 or more"
    assert ranks({"ranks": {"full": [9], "open": [7]}, "hidden": 0, "untold": 2}) == "full, open, 2 untold"
    assert ranks({"ranks": {"rescaled-low-rank": [6]}, "hidden": 0, "untold": 0}) == "6 and rescaled"
    assert ranks({"ranks": {}, "hidden": 0, "untold": 0}) == "no change"


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["--stored"]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "docs/gallery.md").read_text()
    results = json.loads(command.RESULTS.read_text())
    assert list(results["methods"]) == list(methods())
    results["methods"]["lora"]["trained"] += 1
    assert page(results) != printed


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--only lora,lara", "no such method: lara"),
        ("--only lora --steps 7", "holds a run of other steps or layers"),
        ("--stored --results nowhere.json", "nowhere.json is not there"),
    ],
)
def test_wrong_use_is_one_sentence(given: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(given.split())
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
