"""infer on real fine-tunes that no adapter made, and on a real model that one did.

The weights come out of pip packages. Where one is not installed these tests fail with the command that installs it;
they never skip. The merge is made with torch, apart from the package's own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lora_check.inferring.line import infer
from lora_check.inferring.outcome import Kind
from lora_check.inferring.words import says

BERT, SCEPTR = "models/transformers/{}/pytorch_model.bin", "_model_saves/{}/state_dict.pt"


def place(package: str, version: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"pip install --no-deps {package}=={version}"
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / path


def bert(name: str) -> Path:
    return place("rxnfp", "0.1.0", BERT.format(name))


def sceptr(name: str) -> Path:
    return place("sceptr", "1.2.0", SCEPTR.format(name))


def test_a_whole_model_that_was_trained_on_is_no_merge() -> None:
    found = infer(bert("bert_pretrained"), bert("bert_ft_10k_25s"), jobs=1)
    assert says(found).startswith("a full fine-tune, not a LoRA merge; biases and norms too; ")
    assert "1 of 2 rows of token_type_embeddings changed" in says(found)
    assert not found.of(Kind.LOW_RANK, Kind.FAINT, Kind.UNCLEAR)
    assert len(found.of(Kind.FULL)) == 74


def test_a_model_of_which_layers_were_frozen_is_no_merge() -> None:
    found = infer(sceptr("SCEPTR"), sceptr("SCEPTR_finetuned"), jobs=1)
    assert says(found).startswith("a full fine-tune of ")
    assert "not a LoRA merge" in says(found)
    assert (len(found.of(Kind.FULL)), len(found.of(Kind.COPY)), len(found.of(Kind.LOW_RANK))) == (6, 26, 0)
    assert infer(sceptr("SCEPTR_MLM_only"), sceptr("SCEPTR"), jobs=1).of(Kind.LOW_RANK) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_model_with_an_adapter_merged_is_one(dtype: torch.dtype) -> None:
    """Real weights with their outliers: of each delta, 3 % of the norm of its weight."""
    base = {name: one.to(dtype) for name, one in torch.load(bert("bert_pretrained"), weights_only=True).items()}
    merged, generator = dict(base), torch.Generator().manual_seed(1)
    for name in [one for one in base if one.endswith(("query.weight", "value.weight"))]:
        rows, columns = base[name].shape
        b, a = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((rows, 5), (5, columns)))
        delta = b @ a
        merged[name] = (base[name].double() + 0.03 * delta * base[name].double().norm() / delta.norm()).to(dtype)
    assert says(infer(base, merged, jobs=1)) == "a LoRA merge of rank 5 in query and value"
