"""infer on what other methods than LoRA leave behind: real weights, trained for some steps and rounded when saved.

Two layers of a real BERT out of a pip package, a batch of one kind, and each method's own few lines. Beside each stands
the same change with more or less behind it: a wrong 'LoRA merge' is the worst answer, and no answer the next worst.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_check.inferring.line import infer
from lora_check.inferring.outcome import Change, Inference, Kind
from lora_check.inferring.words import DECODED, MATRICES, remarks, says

RANK, ALPHA, RATE = 6, 10, 1e-3
TARGETS = ("query", "key", "value", "dense")
Model = dict[str, Tensor]
Step = Callable[[], None]


def folder() -> Path:
    found = importlib.util.find_spec("rxnfp")
    assert found is not None, "pip install --no-deps rxnfp==0.1.0"
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "models/transformers/bert_pretrained"


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def network() -> Any:
    """The first two layers, in float32 and of numbers that bfloat16 holds."""
    from transformers import BertConfig, BertForMaskedLM

    options = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with quiet():
        found = BertForMaskedLM(BertConfig.from_pretrained(folder(), **options))
    stored = torch.load(folder() / "pytorch_model.bin", weights_only=True)
    wanted = {name: stored[name].bfloat16().float() for name in found.state_dict() if name in stored}
    assert len(wanted) > len(found.state_dict()) // 2
    found.load_state_dict(wanted, strict=False)
    return found.train()


def train(model: Any, steps: int, step: Step, forget: Step) -> None:
    """The same batch again and again."""
    ids = torch.randint(12, 591, (8, 24), generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        forget()
        model(input_ids=ids, labels=ids).loss.backward()
        step()


def adamw(model: Any, rate: float) -> torch.optim.Optimizer:
    trained = [one for one in model.parameters() if one.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)


def saved(model: Any, dtype: torch.dtype = torch.bfloat16) -> Model:
    return {name: one.detach().to(dtype).clone() for name, one in model.state_dict().items()}


@pytest.fixture(scope="module")
def base() -> Model:
    return saved(network())


def weights(model: Any) -> dict[str, Tensor]:
    """Of the linear layers in the encoder."""
    found = {name: one for name, one in model.named_parameters() if ".encoder." in name and one.dim() == 2}
    model.requires_grad_(requires_grad=False)
    return {name: one.requires_grad_() for name, one in found.items()}


def tuned(steps: int, **options: Any) -> Any:
    """A PEFT model, trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    with quiet():
        model = get_peft_model(network(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), **options))
        optimiser = adamw(model, RATE)
        train(model, steps, lambda: optimiser.step(), optimiser.zero_grad)
    return model


def merged(model: Any) -> Model:
    with quiet():
        return saved(model.merge_and_unload())


def look(base: Model, other: Model) -> Inference:
    return infer(base, other, jobs=1)


# ------------------------------------------------------------------------------------------------------ full fine-tune


@pytest.mark.parametrize("steps", [5, 30])
def test_a_short_full_fine_tune_is_no_merge(base: Model, steps: int) -> None:
    """Adam's first steps are about as large everywhere: above the noise of bfloat16 stand few directions of many."""
    model = network()
    optimiser = adamw(model, 1e-4)
    train(model, steps, lambda: optimiser.step(), optimiser.zero_grad)
    found = look(base, saved(model))
    assert says(found).startswith("a full fine-tune")
    assert "not a LoRA merge" in says(found)
    assert "biases" in says(found)
    assert not [one for one in found.changes if one.ends]
    assert found.exit_code == 0


def test_a_module_alone_whose_end_is_not_seen_is_neither(base: Model) -> None:
    """Without the rest of the model nothing tells a fine-tune in full from an adapter of high rank: that is said."""
    model = network()
    optimiser = adamw(model, 1e-4)
    train(model, 5, lambda: optimiser.step(), optimiser.zero_grad)
    trained = saved(model)
    kept = {name: one if name.endswith("query.weight") else base[name] for name, one in trained.items()}
    found = look(base, kept)
    assert "LoRA" not in says(found)
    assert "whose end is not seen, in query" in says(found)
    assert found.exit_code == 3


# -------------------------------------------------------------------------------------------------------- the others


def test_a_merge_of_the_same_training_is_one(base: Model) -> None:
    """The control of all others."""
    found = look(base, merged(tuned(30)))
    assert says(found) == "a LoRA merge of rank 6 in query, key, value and dense"
    assert all(one.ends for one in found.of(Kind.LOW_RANK))


def test_dora_is_rows_rescaled_beside_its_rank_and_no_merge(base: Model) -> None:
    found = look(base, merged(tuned(30, use_dora=True)))
    told = found.of(Kind.RESCALED_LOW_RANK)
    assert not found.of(Kind.LOW_RANK)
    assert "a LoRA merge of" not in says(found)
    assert "rows rescaled beside a change of rank 6" in says(found)
    assert sum(one.rank == RANK for one in told) > len(found.of(*MATRICES)) // 2


def test_galore_is_of_low_rank_and_not_called_a_merge(base: Model) -> None:
    """Three subspaces of rank 6 add up to 18 directions, of which bfloat16 leaves some: other ones in each matrix."""
    model = network()
    trained = weights(model)
    states: dict[str, list[Tensor]] = {}
    taken = 0

    def step() -> None:
        nonlocal taken
        for name, one in trained.items():
            assert one.grad is not None
            if taken % 10 == 0:
                basis = torch.linalg.svd(one.grad, full_matrices=False)[0][:, :RANK].clone()
                states[name] = [basis, torch.zeros(RANK, one.shape[1]), torch.zeros(RANK, one.shape[1])]
            basis, first, second = states[name]
            small = basis.T @ one.grad
            first.mul_(0.9).add_(small, alpha=0.1)
            second.mul_(0.999).addcmul_(small, small, value=0.001)
            one.data.sub_(basis @ (first / (second.sqrt() + 1e-8)), alpha=3e-5)
        taken += 1

    train(model, 30, step, model.zero_grad)
    found = look(base, saved(model))
    assert says(found).startswith("of low rank in ")
    assert "weaker ones that sink into it; a LoRA merge or another fine-tune in few directions" in says(found)
    assert not found.is_lora
    assert all(one.hidden for one in found.of(Kind.LOW_RANK) if one.rank < RANK)


def test_delta_lora_is_of_low_rank_and_stored_twice(base: Model) -> None:
    """W + (1 + lambda) s B A of the end - lambda s B A of the start: of rank 12, and saved in between."""
    from peft.tuners.lora import Linear

    model = tuned(10)
    layers = [one for one in model.modules() if isinstance(one, Linear)]
    before = [one.get_delta_weight("default").clone() for one in layers]
    with quiet():
        optimiser = adamw(model, RATE)
        train(model, 20, lambda: optimiser.step(), optimiser.zero_grad)
    for one, was in zip(layers, before, strict=True):
        moved = one.base_layer.weight.data + 0.5 * (one.get_delta_weight("default") - was)
        one.base_layer.weight.data = moved.bfloat16().float()
    found = look(base, merged(model))
    low = found.of(Kind.LOW_RANK)
    assert len(low) == len(layers)
    assert {one.stores for one in low} == {2}
    assert all(RANK <= one.rank <= one.rank + one.hidden <= 2 * RANK for one in low)
    assert any("the noise of 2 stores" in one for one in remarks(found))
    assert look(base, merged(tuned(30))).of(Kind.LOW_RANK)[0].stores == 1


def test_all_of_a_model_of_low_rank_is_not_called_a_merge(base: Model) -> None:
    """One step of plain descent on one row of three tokens: of rank 3 everywhere, embeddings and norms moved too."""
    model = network()
    ids = torch.tensor([[40, 71, 302]])
    model(input_ids=ids, labels=ids).loss.backward()
    for one in model.parameters():
        if one.grad is not None:
            one.data.sub_(one.grad, alpha=0.02)
    wide = {name: one.float() for name, one in base.items()}
    found = look(wide, saved(model, torch.float32))
    assert {one.rank for one in found.of(Kind.LOW_RANK) if ".encoder." in one.tensor} <= {1, 2, 3}
    assert "a LoRA merge of" not in says(found)


@pytest.mark.parametrize(
    ("rescaled", "full", "said"),
    [
        (10, 3, "rows rescaled beside a change of rank 6, as DoRA merges, in query"),
        (3, 10, "a full fine-tune of dense"),
    ],
    ids=["most rescaled", "most in full"],
)
def test_a_few_matrices_in_full_do_not_make_a_full_fine_tune_of_a_rescaled_model(
    rescaled: int, full: int, said: str
) -> None:
    def some(kind: Kind, family: str, count: int) -> list[Change]:
        shape = (48, 64)
        names = [f"layer.{at}.{family}.weight" for at in range(count)]
        return [Change(tensor=name, kind=kind, shape=shape, dtype="bfloat16", rank=RANK) for name in names]

    changes = [*some(Kind.RESCALED_LOW_RANK, "query", rescaled), *some(Kind.FULL, "dense", full)]
    still = Change(tensor="word.weight", kind=Kind.COPY, shape=(64, 32), dtype="bfloat16")
    inference = Inference(changes=(*changes, still))
    assert said in says(inference)
    assert inference.is_full is (full > rescaled)
    assert DECODED in remarks(inference)
    norm = Change(tensor="norm.weight", kind=Kind.VECTOR, shape=(64,), dtype="bfloat16")
    assert DECODED not in remarks(replace(inference, changes=(*changes, norm)))
    assert not inference.is_lora
