"""Models and tokenizers as transformers loads them from folders; code that lies beside a model is never run.

head      (base, merged) -> the class that both are run as, and what it answers
loaded    (folder, head) -> the model, and what had to be made up for it
encoder   folder -> text to ids, and ids to text
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_check.errors import InputError
from lora_check.forwarding.kinds import KINDS, Kind
from lora_check.oracles.manners import first_sentence, quiet

BASE, MERGED = "the base", "the merged model"
OTHERWISE = "report checks the weights of any model, and runs none"
NEVER_RUN = f"code that lies beside a model is never run; {OTHERWISE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The class that the models are run as, BASE's configuration for it, what it answers, and remarks on that.

    alike   keys of the two configurations that say the same, said or by default
    """

    loader: Any
    config: Any
    kind: Kind
    remarks: tuple[str, ...] = ()
    alike: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model, and the names of tensors: made up, for no file has them, or not in this shape; not used."""

    model: Any
    missing: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def encoder(folder: Path) -> tuple[Callable[[str], list[int]] | None, Callable[[Sequence[int]], str]]:
    """The tokenizer of a folder: text -> ids, None where there is none, and ids -> text."""
    import transformers

    try:
        with quiet():
            one = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001 - they raise whatever their parsers do, and there is another way: --ids
        one = None
    if one is None or not _has_words(one, folder):
        return None, lambda ids: " ".join(map(str, ids))
    return lambda text: list(one(text)["input_ids"]), lambda ids: str(one.decode(ids))


def _has_words(tokenizer: Any, folder: Path) -> bool:
    """Whether one of its files is there: of none transformers makes a tokenizer to which all words are unknown."""
    files = set(getattr(tokenizer, "vocab_files_names", {}).values())
    return not files or any((folder / name).is_file() for name in (*files, "tokenizer.json"))


# ------------------------------------------------------------------------------------------------------- classes


def head(base: Path, merged: Path) -> Head:
    """What both are run as: MERGED's class, for an adapter may bring the head that BASE lacks.

    raises   InputError: no class of transformers, one that answers no tokens, or two that answer different things
    """
    ours, theirs = _head(base, BASE), _head(merged, MERGED)
    names = ours.loader.__name__, theirs.loader.__name__
    first, second = ours.config.to_dict(), theirs.config.to_dict()
    same = frozenset(key for key in {**first, **second} if first.get(key) == second.get(key))
    if names[0] == names[1]:
        return replace(theirs, config=ours.config, remarks=(*ours.remarks, *theirs.remarks), alike=same)
    alike = ours.config.model_type == theirs.config.model_type
    if not alike or (theirs.kind.name == "hidden" and ours.kind.name != "hidden"):
        raise InputError(
            f"the base {base} is {names[0]} and the merged model {merged} is {names[1]}, whose answers differ in kind",
            hint=OTHERWISE,
        )
    told = f"BASE is {names[0]} and is run as {names[1]}, which MERGED is"
    return replace(
        theirs, config=_labelled(ours.config, theirs), remarks=(*ours.remarks, *theirs.remarks, told), alike=same
    )


def _labelled(config: Any, theirs: Head) -> Any:
    """BASE's configuration with the labels of the head that it lacks."""
    if theirs.kind.top == "label":
        for key in ("id2label", "label2id", "problem_type"):
            setattr(config, key, getattr(theirs.config, key, None))
    return config


def _head(folder: Path, what: str) -> Head:
    import transformers

    raw = _raw(folder, what)
    own = bool(raw.get("auto_map"))
    if not raw.get("model_type"):
        raise InputError(f"config.json of {folder} tells no model_type, so that {what} cannot be made", hint=OTHERWISE)
    if str(raw["model_type"]) not in transformers.CONFIG_MAPPING:
        said = f"{what} {folder} is of model_type {raw['model_type']!r}"
        raise InputError(f"{said}, which transformers does not have", hint=NEVER_RUN)
    with quiet(), reading(f"load {what}", folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = _class_name(config, folder, what)
    loader = getattr(transformers, name, None)
    if not (isinstance(loader, type) and issubclass(loader, transformers.PreTrainedModel)):
        raise InputError(f"{what} {folder} is {name}, which transformers does not have", hint=NEVER_RUN)
    theirs: Any = getattr(loader, "config_class", None)
    if isinstance(theirs, type) and not isinstance(config, theirs):
        kinds = f"model_type {config.model_type} and the class {name}, which is of another"
        raise InputError(f"config.json of {folder} names the {kinds}", hint="mend config.json")
    remark = f"{what} names code of its own, which is never run: it is run as transformers' own {name}"
    return Head(loader=loader, config=config, kind=_kind(loader, config, folder, what), remarks=(remark,) * own)


def _raw(folder: Path, what: str) -> Mapping[str, Any]:
    """config.json, before transformers reads it."""
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{what} {folder} has no config.json that can be read, so that its class is not known", hint=OTHERWISE
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}", hint="write the file again") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} is no JSON object", hint="write the file again")
    return found


def _class_name(config: Any, folder: Path, what: str) -> str:
    """The class that the checkpoint was saved from; where it names none, that of its kind which has a usual head."""
    named = getattr(config, "architectures", None) or [_usual(config.model_type)]
    first = named if isinstance(named, str) else named[0] if isinstance(named, list) else None
    if not isinstance(first, str) or not first:
        raise InputError(
            f"config.json of {folder} names {named!r} as architectures of {what}", hint='give a list: ["..."]'
        )
    return first


def _usual(model_type: str) -> str:
    """Decoders tell the next token; what can fill in masks as well is no decoder, and has no head unless it says so."""
    tables = {kind.name: _tables(kind)[0] for kind in KINDS}
    decodes = model_type in tables["causal"] and not _encodes(model_type)
    found = (tables["causal"] if decodes else tables["hidden"]).get(model_type, "")
    return found if isinstance(found, str) else str(found[0])


def _encodes(model_type: str) -> bool:
    """Whether models of this type can fill in masks."""
    return any(model_type in table for kind in KINDS if kind.name == "masked" for table in _tables(kind))


def _tables(kind: Kind) -> list[Mapping[str, Any]]:
    """model_type -> the class, or the classes, of this kind."""
    from transformers.models.auto import modeling_auto

    return [getattr(modeling_auto, table) for table in kind.tables]


def _kind(loader: Any, config: Any, folder: Path, what: str) -> Kind:
    name = loader.__name__
    fits = [kind for kind in KINDS if name in _classes(kind)]
    if not fits or loader.main_input_name != "input_ids":
        does = "reads no tokens" if loader.main_input_name != "input_ids" else "answers what forward cannot compare"
        raise InputError(f"{what} {folder} is {name}, which {does}", hint=OTHERWISE)
    if fits[0].top == "label" and (config.num_labels == 1 or _several(config)):
        return replace(fits[0], chances=False, of="number")
    return fits[0]


def _classes(kind: Kind) -> set[str]:
    every = [one for table in _tables(kind) for one in table.values()]
    return {name for one in every for name in ((one,) if isinstance(one, str) else one)}


def _several(config: Any) -> bool:
    """Labels that do not exclude each other have no distribution."""
    return getattr(config, "problem_type", None) in ("multi_label_classification", "regression")


def limits(one: Head) -> tuple[int | None, int | None]:
    """The positions and the vocabulary that the configuration tells; None where it is silent."""
    text = one.config.get_text_config() if hasattr(one.config, "get_text_config") else one.config
    positions = getattr(text, "max_position_embeddings", None)
    return (None if positions is None else positions - _offset(one)), getattr(text, "vocab_size", None)


def _offset(one: Head) -> int:
    """Rows of a table of positions that no position has: RoBERTa's kin, all encoders, count from the padding on."""
    import torch
    from torch import nn

    if not _encodes(one.config.model_type):
        return 0
    with quiet(), reading("make a model of", Path(one.config.name_or_path or "config.json")), torch.device("meta"):
        model = one.loader(one.config)
    tables = (part for name, part in model.named_modules() if name.endswith("position_embeddings"))
    skipped = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return max((index + 1 for index in skipped if index is not None), default=0)


# ------------------------------------------------------------------------------------------------------- loading


def loaded(folder: Path, what: str, one: Head, *, dtype: str, device: str) -> Loaded:
    """The model as transformers loads it, and what it had to make up or to leave out for that."""
    import torch
    import transformers

    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    with reading(f"load {what}", folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what has to be made up is the same each time
        model, told = one.loader.from_pretrained(
            folder,
            config=one.config if what == BASE else None,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **{key: getattr(torch, dtype)},
        )
    return Loaded(
        model=model.to(device).eval(),
        missing=_names(told, "missing_keys"),
        reshaped=_names(told, "mismatched_keys"),
        unused=_names(told, "unexpected_keys"),
    )


def _names(told: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(sorted(str(one[0] if isinstance(one, tuple) else one) for one in told.get(key) or ()))


def few(names: Sequence[str], says: str) -> tuple[str, ...]:
    """One line about a few of these, none where there are none; `says` has {} for them."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (says.format(", ".join(names[:3]) + rest),) if names else ()


# ------------------------------------------------------------------------------------------------------- manners


@contextmanager
def reading(deed: str, what: Path | str) -> Iterator[None]:
    """Turn whatever the libraries raise here into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = f"there is no {error.args[0]}" if isinstance(error, KeyError) and error.args else str(error)
        said = first_sentence(text) or type(error).__name__
        raise InputError(f"could not {deed} {what}: {said}", hint=OTHERWISE) from error
