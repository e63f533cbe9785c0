"""Three models on the same tokens: base, base with its adapters unmerged as PEFT runs them, and merged.

spoken   (folders, sequences, how) -> what each says, and the modules of the merged one that depart

One model is in memory at a time. The base is run before the adapters are laid over it, so that one load serves both;
then PEFT merges it in memory, which tells how far an honest merge of these very files moves the answers.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_check.errors import InputError, UsageError
from lora_check.forwarding.bounds import Noise
from lora_check.forwarding.nouns import Asked, Lockstep, Said
from lora_check.oracles.attaching import Together
from lora_check.oracles.loading import BASE, MERGED, Head, Loaded, few, loaded, reading
from lora_check.oracles.manners import quiet

NEEDED = ("peft", "transformers")
PADDING = "none: one sequence at a time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and in what the models are computed.

    dtype     of all of them          storage   the coarsest dtype that MERGED is stored in; empty: one not modelled
    narrower  that is coarser than what BASE is stored in, so that BASE was rounded too
    """

    base: Path
    adapters: tuple[Path, ...]
    merged: Path
    head: Head
    together: Together
    device: str
    dtype: str
    storage: str
    narrower: bool
    tokens: int


def demand_libraries(device: str) -> None:
    """Raise UsageError where PEFT, transformers or the device are not there."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"forward needs {' and '.join(missing)}", hint="pip install lora_check[parity]")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here", hint="leave --device out")


# -------------------------------------------------------------------------------------------------- three models


def spoken(setting: Setting, asked: Sequence[Asked]) -> tuple[dict[str, Said], Lockstep]:
    """Load, run and let go of base, unmerged and merged.

    raises   InputError: transformers or PEFT refuse the files
    """
    import torch

    with quiet(), torch.no_grad(), _full_precision():
        said, record = _unmerged(setting, asked)
        gc.collect()
        merged = loaded(setting.merged, MERGED, setting.head, dtype=setting.dtype, device=setting.device)
        with reading("run the merged model", setting.merged):
            said["merged"] = _said(merged.model, asked, setting, **_made_up(merged, MERGED))
            given = [_given(merged.model, one, setting) for one in asked]
            lockstep = _stepped(merged.model, given, setting, record)
    return said, lockstep


def _unmerged(setting: Setting, asked: Sequence[Asked]) -> tuple[dict[str, Said], Any]:
    """Run the base, lay the adapters over it, run that, record it, and merge it in memory."""
    from lora_check.oracles.attaching import attached, brought
    from lora_check.oracles.expecting import expect
    from lora_check.oracles.recording import recorded

    base = loaded(setting.base, BASE, setting.head, dtype=setting.dtype, device=setting.device)
    with reading("run the base", setting.base):
        alone = _answers(base.model, asked, setting)
        bare = _said(base.model, asked, setting, logits=alone)
        given = [_given(base.model, one, setting) for one in asked]
    over = attached(base.model, setting.adapters, setting.together)
    theirs = brought(over.model, base.missing, setting.adapters, setting.together)
    made: dict[str, Any] = {**_made_up(base, BASE, besides=theirs), "brought": theirs}
    adapters = ", ".join(map(str, setting.adapters))
    with reading("run unmerged", adapters):
        said = {
            "base": replace(bare, **made),
            "unmerged": _said(over.model, asked, setting, invented=over.invented),
        }
        record = recorded(over.model, given, _answer)
        if setting.storage:
            stores = 1 if setting.together.combination else len(setting.adapters)
            noise = Noise(storage=setting.storage, stores=stores + setting.narrower)
            expect(record, noise, derived=setting.together.derived)
    with reading("merge in memory", adapters):
        over.model.merge_adapter(adapter_names=list(over.names))
        said["live"] = Said(logits=_answers(over.model, asked, setting))
    return said, record


def _made_up(one: Loaded, what: str, besides: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """What is to be said of the loading; `besides`: names that an adapter brings."""
    made = "transformers made up random numbers"
    missing = [name for name in one.missing if name not in besides]
    return {
        "invented": (
            *few(missing, f"{what} has no {{}}: {made}"),
            *few(one.reshaped, f"{what} has {{}} of another shape than its class: {made}"),
        ),
        "remarks": (
            *few(besides, f"{what} has no {{}}, which the adapter brings: without it {what} is not compared"),
            *few(one.unused, f"{what} has {{}}, which its class does not use"),
        ),
    }


def _stepped(merged: Any, given: Sequence[Any], setting: Setting, record: Any) -> Lockstep:
    from lora_check.oracles.lockstep import replayed

    if not setting.storage:
        return Lockstep(unjudged="the rounding of the dtype that MERGED is stored in is not modelled")
    return replayed(merged, given, _answer, record, narrower=setting.narrower and setting.dtype != setting.storage)


def _said(model: Any, asked: Sequence[Asked], setting: Setting, **more: Any) -> Said:
    """What a model answers to everything, and how it goes on with the prompts."""
    talks = setting.tokens and setting.head.kind.talks
    goes = [_continued(model, one, setting) if one.goes_on else ((), None) for one in asked] if talks else []
    return Said(
        logits=more.pop("logits", None) or _answers(model, asked, setting),
        new=tuple(new for new, _ in goes),
        steps=tuple(steps for _, steps in goes),
        circumstances=_circumstances(_inner(model)),
        **more,
    )


def _answers(model: Any, asked: Sequence[Asked], setting: Setting) -> tuple[Any, ...]:
    inner = _inner(model)
    return tuple(_answer(inner, _given(inner, one, setting)) for one in asked)


def _given(model: Any, one: Asked, setting: Setting) -> dict[str, Any]:
    """What the model is called with: the tokens; where it reads and answers, both, the answer shifted by its start."""
    import torch

    ids = torch.tensor([one.ids], device=setting.device)
    found: dict[str, Any] = {"input_ids": ids}
    takes = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in takes and setting.head.kind.top == "token":
        start = _start(model)
        read, answer = (ids[:, : one.split], ids[:, one.split :]) if one.split else (ids, ids)
        shifted = torch.cat([ids.new_full((1, 1), start), answer[:, :-1]], dim=1)
        found = {"input_ids": read, "decoder_input_ids": shifted}
    return found | ({"use_cache": False} if "use_cache" in takes else {})


def _start(model: Any) -> int:
    """The token that an answer begins with."""
    places = (getattr(model, "generation_config", None), model.config)
    found = [getattr(one, "decoder_start_token_id", None) for one in places]
    known = [one for one in found if isinstance(one, int)]
    if not known:
        raise InputError("config.json of BASE tells no decoder_start_token_id", hint="add the one it was trained with")
    return known[0]


def _answer(model: Any, given: Any) -> Any:
    """(rows, columns) of logits, or of the last hidden state where there is no head."""
    output = model(**given)
    found = output.get("logits", output.get("last_hidden_state"))
    if found is None:
        raise InputError(f"a {type(model).__name__} answers neither logits nor a hidden state", hint="report runs none")
    return found.detach().reshape(-1, found.shape[-1])


def _continued(model: Any, one: Asked, setting: Setting) -> tuple[tuple[int, ...], Any]:
    """Greedy: of the generation configuration only the tokens that begin and end a text are followed."""
    import torch
    from transformers import GenerationConfig

    inner = _inner(model)
    theirs = inner.generation_config
    kept = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
    inner.generation_config = GenerationConfig(**{key: getattr(theirs, key, None) for key in kept})
    ids = torch.tensor([one.ids], device=setting.device)
    try:
        found = inner.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=setting.tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        inner.generation_config = theirs
    return tuple(found.sequences[0, -len(found.logits) :].tolist()), torch.cat(list(found.logits))


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _circumstances(model: Any) -> dict[str, str]:
    attention = getattr(model.config, "_attn_implementation", None) or "not said"
    return {"class": type(model).__name__, "attention": str(attention)}


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in the dtype of the model, summed in fp32: neither TF32 nor sums in 16 bits on a GPU."""
    import torch

    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
