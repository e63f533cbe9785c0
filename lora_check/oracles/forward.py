"""Three models on the same tokens: base, base with its adapters unmerged as PEFT runs them, and merged.

spoken   (folders, sequences, how) -> what each says, and the modules of the merged one that depart

One model is in memory at a time. The base is run before the adapters are laid over it, so that one load serves both;
then PEFT merges it in memory, which tells how far an honest merge of these very files moves the answers.
"""

from __future__ import annotations

import gc
import logging as python
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_check.errors import InputError, UsageError
from lora_check.forwarding.bounds import Noise
from lora_check.forwarding.nouns import Asked, Lockstep, Said

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
    device: str
    dtype: str
    storage: str
    narrower: bool
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Remarks:
    """What loading made up, and what it left out."""

    invented: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


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
        ids = [torch.tensor([one.ids], device=setting.device) for one in asked]
        said: dict[str, Said] = {}
        model, remarks = _loaded(setting.base, "the base", setting)
        said["base"] = _said(model, asked, setting, remarks)
        record = _unmerged(model, asked, ids, setting, said)
        del model
        gc.collect()
        merged, remarks = _loaded(setting.merged, "the merged model", setting)
        with _reading("run the merged model", setting.merged):
            said["merged"] = _said(merged, asked, setting, remarks)
            lockstep = _stepped(merged, ids, setting, record)
    return said, lockstep


def _unmerged(model: Any, asked: Sequence[Asked], ids: Sequence[Any], setting: Setting, said: dict[str, Said]) -> Any:
    """Lay the adapters over the base, run that, record it, and merge it in memory."""
    from lora_check.oracles.expecting import expect
    from lora_check.oracles.recording import recorded

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = _with_adapters(model, setting.adapters)
    said["unmerged"] = _said(model, asked, setting, Remarks(invented=tuple(_lost(heard))))
    record = recorded(model, ids, _logits)
    if setting.storage:
        expect(record, Noise(storage=setting.storage, stores=len(setting.adapters) + setting.narrower))
    names = [_name(index) for index in range(len(setting.adapters))]
    with _reading("merge in memory the adapters of", setting.base):
        model.merge_adapter(adapter_names=names)
    said["live"] = Said(logits=tuple(_logits(model.get_base_model(), one) for one in ids))
    return record


def _lost(heard: Sequence[warnings.WarningMessage]) -> Iterator[str]:
    """PEFT says in a warning that it leaves factors at what they were drawn as."""
    for one in heard:
        if "missing adapter keys" in str(one.message):
            yield f"PEFT: {str(one.message).splitlines()[0][:200]}"


def _stepped(merged: Any, ids: Sequence[Any], setting: Setting, record: Any) -> Lockstep:
    from lora_check.oracles.lockstep import replayed

    if not setting.storage:
        return Lockstep(unjudged="the rounding of the dtype that MERGED is stored in is not modelled")
    return replayed(merged, ids, _logits, record, narrower=setting.narrower and setting.dtype != setting.storage)


def _said(model: Any, asked: Sequence[Asked], setting: Setting, remarks: Remarks) -> Said:
    import torch

    logits = [_logits(model, torch.tensor([one.ids], device=setting.device)) for one in asked]
    goes = [_continued(model, one, setting) if one.goes_on and setting.tokens else ((), None) for one in asked]
    return Said(
        logits=tuple(logits),
        new=tuple(new for new, _ in goes),
        steps=tuple(steps for _, steps in goes),
        remarks=remarks.left_out,
        invented=remarks.invented,
        circumstances=_circumstances(model),
    )


def _logits(model: Any, ids: Any) -> Any:
    """(positions, vocabulary), without a cache."""
    return model(input_ids=ids, use_cache=False).logits[0].detach()


def _continued(model: Any, one: Asked, setting: Setting) -> tuple[tuple[int, ...], Any]:
    """Greedy: of the generation configuration only the tokens that end a text are followed."""
    import torch
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    theirs = inner.generation_config
    inner.generation_config = GenerationConfig(
        eos_token_id=theirs.eos_token_id, pad_token_id=theirs.pad_token_id, bos_token_id=theirs.bos_token_id
    )
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
    return tuple(found.sequences[0, ids.shape[1] :].tolist()), torch.cat(list(found.logits))


def _circumstances(model: Any) -> dict[str, str]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = getattr(inner.config, "_attn_implementation", None) or "not said"
    return {"class": type(inner).__name__, "attention": str(attention)}


# ------------------------------------------------------------------------------------------------------ loading


def encoder(folder: Path) -> tuple[Callable[[str], list[int]] | None, Callable[[Sequence[int]], str]]:
    """The tokenizer of a folder: text -> ids, None where there is none, and ids -> text."""
    import transformers

    try:
        with quiet():
            one = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001 - they raise whatever their parsers do, and there is another way: --ids
        return None, lambda ids: " ".join(map(str, ids))
    return lambda text: list(one(text)["input_ids"]), lambda ids: str(one.decode(ids))


def limits(folder: Path) -> tuple[int | None, int | None]:
    """The context and the vocabulary that the base's configuration tells.

    raises   InputError: it is no model that tells the next token
    """
    config = _config(folder, "the base")
    _causal(config, folder, "the base")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)


def _config(folder: Path, what: str) -> Any:
    import transformers

    with quiet(), _reading(f"load {what}", folder):
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _loaded(folder: Path, what: str, setting: Setting) -> tuple[Any, Remarks]:
    """The model as transformers loads it, and what it had to invent or to leave out for that."""
    import torch
    import transformers

    loader = _causal(_config(folder, what), folder, what)
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    with _reading(f"load {what}", folder):
        model, told = loader.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **{dtype: getattr(torch, setting.dtype)},
        )
    return model.to(setting.device).eval(), _told(told, what)


def _told(told: Mapping[str, Any], what: str) -> Remarks:
    """What transformers made up, and what it left out."""
    made = "transformers made up random numbers"
    return Remarks(
        invented=(
            *_named(told, "missing_keys", f"{what} has no {{}}: {made}"),
            *_named(told, "mismatched_keys", f"{what} has {{}} of another shape than its class: {made}"),
        ),
        left_out=_named(told, "unexpected_keys", f"{what} has {{}}, which its class does not use"),
    )


def _named(told: Mapping[str, Any], key: str, says: str) -> tuple[str, ...]:
    names = sorted(str(one[0] if isinstance(one, tuple) else one) for one in told.get(key) or ())
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (says.format(", ".join(names[:3]) + rest),) if names else ()


def _causal(config: Any, folder: Path, what: str) -> Any:
    """The class that its configuration names, if it tells the next token."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    usual = KNOWN.get(getattr(config, "model_type", ""), "of no class that transformers knows")
    names = getattr(config, "architectures", None) or [usual]
    every = {name for one in KNOWN.values() for name in (one if isinstance(one, (tuple, list)) else (one,))}
    found = getattr(transformers, names[0], None)
    if names[0] not in every or found is None:
        raise InputError(
            f"{what} {folder} is {names[0]}, and forward compares models that tell the next token",
            hint="report checks the weights of any model",
        )
    return found


def _with_adapters(model: Any, folders: Sequence[Path]) -> Any:
    """As PEFT loads them; several are all active, so that their deltas add up."""
    import peft

    first, *others = folders
    with _reading("load the adapter", first):
        model = peft.PeftModel.from_pretrained(model, str(first), adapter_name=_name(0))
    for index, folder in enumerate(others, start=1):
        with _reading("load the adapter", folder):
            model.load_adapter(str(folder), adapter_name=_name(index))
    with _reading("activate the adapters of", first):
        if others:
            model.base_model.set_adapter([_name(index) for index in range(len(folders))])
    return model.eval()


def _name(index: int) -> str:
    return f"adapter{index + 1}"


# ------------------------------------------------------------------------------------------------------ manners


@contextmanager
def _reading(deed: str, folder: Path) -> Iterator[None]:
    """Turn whatever the libraries raise here into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise InputError(f"could not {deed} {folder}: {said}", hint="report needs neither PEFT nor a run") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, logs and progress bars of the libraries, which no user can act on; errors are raised as ever."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    silent = python.root.manager.disable
    python.disable(max(silent, python.WARNING))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        python.disable(silent)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
