"""merge_and_unload of the installed PEFT, as one more producer.

merge      (base, adapters, safe) -> the merged module, in the base's own dtype
versions   what is installed, without importing it
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_check.errors import InputError, NotFoundError, UsageError, WrongInputError
from lora_check.oracles.manners import first_sentence, quiet
from lora_check.remote.place import is_url

if TYPE_CHECKING:
    from torch import nn

NEEDED = ("peft", "transformers")
TOLD = ("peft", "transformers", "torch", "safetensors", "accelerate")


def merge(base_location: str, adapter_locations: Sequence[str], *, safe: bool) -> nn.Module:
    """Load base and adapters and let PEFT merge them in the order given.

    raises   UsageError: a library is missing; InputError: PEFT or transformers refuse these files
    """
    _demand_libraries()
    _demand_folders(base_location, adapter_locations)
    _transformers()
    with quiet():
        model = _load_adapters(_load_base(base_location), adapter_locations)
        return _merge(model, len(adapter_locations), safe=safe)


def versions() -> dict[str, str]:
    """The installed versions of what takes part in a live merge."""
    return {name: version for name in TOLD if (version := _version(name))}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _demand_libraries() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"parity needs {' and '.join(missing)}", hint="pip install lora_check[parity]")


def _demand_folders(base: str, adapters: Sequence[str]) -> None:
    for location in (base, *adapters):
        if is_url(location):
            hint = "name a folder or a hub id; report and merge read URLs"
            raise UsageError(f"parity loads with PEFT, which reads no URL such as {location}", hint=hint)
        if location.startswith((os.sep, os.curdir)) and not os.path.exists(location):
            raise NotFoundError(f"nothing lies at {location}", hint="name an existing folder, or a hub id")
        if os.path.isfile(location):
            raise WrongInputError(
                f"parity loads whole folders, and {location} is a file", hint="name the folder with its config"
            )
    if not adapters:
        raise UsageError("parity needs at least one adapter")


# ----------------------------------------------------------------------------------------------------- loading


def _load_base(location: str) -> Any:
    transformers = _transformers()
    with _reading("the base", location):
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
    loader = _loader(transformers, config, location)
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    with _reading("the base", location):
        return loader.from_pretrained(location, config=config, **{dtype: "auto"})


def _loader(transformers: Any, config: Any, location: str) -> Any:
    """The class that the checkpoint was saved from; AutoModel for a configuration that names none."""
    names = getattr(config, "architectures", None) or []
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(
            f"the base {location} is a {names[0]}, which transformers {transformers.__version__} does not have",
            hint="install a transformers that has it; code that lies beside a model is never run",
        )
    return found


def _load_adapters(model: Any, locations: Sequence[str]) -> Any:
    first, *others = locations
    with _reading("the adapter", first):
        model = _peft().PeftModel.from_pretrained(model, first, adapter_name=_name(0))
    for index, location in enumerate(others, start=1):
        with _reading("the adapter", location):
            model.load_adapter(location, adapter_name=_name(index))
    return model


def _merge(model: Any, count: int, *, safe: bool) -> nn.Module:
    names = [_name(index) for index in range(count)]
    with _reading("the merge of", ", ".join(names)):
        merged: nn.Module = model.merge_and_unload(safe_merge=safe, adapter_names=names)
    return merged


def _name(index: int) -> str:
    return f"adapter{index + 1}"


# ----------------------------------------------------------------------------------------------------- manners


@contextmanager
def _reading(what: str, location: str) -> Iterator[None]:
    """Turn whatever the libraries raise here into one sentence."""
    try:
        yield
    except Exception as error:
        first = first_sentence(str(error)) or type(error).__name__
        kind = NotFoundError if isinstance(error, FileNotFoundError) else InputError
        raise kind(f"could not load {what} {location}: {first}", hint="parity needs files that PEFT loads") from error


def _transformers() -> Any:
    with _reading("the library", "transformers"):
        import transformers
    return transformers


def _peft() -> Any:
    with _reading("the library", "peft"):
        import peft
    return peft
