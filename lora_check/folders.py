"""A folder -> what lies in it beside the tensors that were read: other weights, indexes, what a model is used with.

Names and headers only. Whether other weights hold the same numbers is found out when it is asked for.

Loaders do not agree on a folder with several checkpoints. transformers takes model.safetensors, then the shards that
model.safetensors.index.json names, then pytorch_model.bin, then its shards; vLLM the shards of an index where there is
one; mlx-lm and the converter of llama.cpp every model*.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_check.errors import InputError, LoraCheckError
from lora_check.formats import _folder
from lora_check.locations import ADAPTER_CONFIG, ADAPTERS, open_checkpoint
from lora_check.types import Checkpoint, Folder, Spare

if TYPE_CHECKING:
    from torch import Tensor

MODELS = ("*.safetensors", "pytorch_model*.bin", "consolidated.*.pth")
"""The weight files of a model; an optimizer's state and an adapter are none."""

FIRST, SECOND = "model.safetensors", "model.safetensors.index.json"
"""The two that transformers and vLLM prefer in opposite order."""

SIDES: Mapping[str, tuple[str, ...]] = {
    "a tokenizer": ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json"),
    "a chat template": ("chat_template.jinja", "chat_template.json"),
    "a generation configuration": ("generation_config.json",),
    "a processor's configuration": ("preprocessor_config.json", "processor_config.json"),
    "the code of its model class": ("modeling_*.py",),
}
"""What a model is used with -> the files that may hold it."""


def look(checkpoint: Checkpoint) -> Folder:
    """What lies in the folder that a checkpoint was opened from; nothing for a single file or for tensors in memory."""
    inner = _innermost(checkpoint)
    place: Path | None = getattr(inner, "folder", None)
    if place is None:
        return Folder()
    read = tuple(getattr(inner, "files", ()))
    names = frozenset(path.name for path in place.iterdir() if path.is_file())
    template = _template(place, names)
    return Folder(
        read=tuple(path.name for path in read),
        spares=tuple(_spares(place, read, inner)),
        adapter=_adapter(names),
        absent=dict(_absent(place)),
        total_size=_total_size(place, read),
        sides={kind: found for kind, found in _sides(place, template) if found},
        generation=_object(place / "generation_config.json"),
        template=template,
    )


def _innermost(checkpoint: Any) -> Any:
    """The checkpoint as it lies in its files, whatever view of it is used."""
    while not hasattr(checkpoint, "folder") and hasattr(checkpoint, "inner"):
        checkpoint = checkpoint.inner
    return checkpoint


def _object(path: Path) -> Mapping[str, Any]:
    """A JSON object; nothing where there is none, for it decides nothing."""
    try:
        return _folder.read_object(path) if path.is_file() else {}
    except InputError:
        return {}


# ------------------------------------------------------------------------------ other weights


def _spares(place: Path, read: Iterable[Path], checkpoint: Checkpoint) -> Iterator[Spare]:
    """The weight files that were not read, those of one set of shards together."""
    taken = {path.name for path in read}
    sets: dict[tuple[str, str], list[Path]] = {}
    for pattern in MODELS:
        for path in sorted(place.glob(pattern)):
            if path.name not in taken and not _is_adapter(path.name):
                part = _folder.PART.fullmatch(path.name)
                key = (part["stem"] + part["suffix"], part["count"]) if part else (path.name, "")
                sets.setdefault(key, []).append(path)
    for files in sets.values():
        yield Spare(
            files=tuple(path.name for path in files),
            rival=_is_rival(place, taken, files),
            differing=lambda files=tuple(files): differing(files, checkpoint),  # type: ignore[misc]
        )


def _is_adapter(name: str) -> bool:
    return name in ADAPTERS or name.endswith("_adapters.safetensors")


def _is_rival(place: Path, taken: set[str], files: Iterable[Path]) -> bool:
    """Whether one of the two loaders takes these where the other takes what was read."""
    return taken == {FIRST} and any(path.name in _named(place / SECOND) for path in files)


def differing(files: Iterable[Path], checkpoint: Checkpoint) -> tuple[str, ...] | None:
    """The tensors that some files hold with other numbers, another shape or dtype than a checkpoint; byte for byte.

    returns   None where a file cannot be read, or has no tensor in common with the checkpoint
    """
    held, shared, other = checkpoint.metas(), 0, []
    try:
        for file in files:
            with closing(open_checkpoint(file, role="merged")) as spare:
                both = [name for name in spare.metas() if name in held]
                shared += len(both)
                other += [name for name in both if not _alike(name, spare, checkpoint)]
    except LoraCheckError:
        return None
    return tuple(other) if shared else None


def _alike(name: str, one: Checkpoint, other: Checkpoint) -> bool:
    mine, theirs = one.metas()[name], other.metas()[name]
    return (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype) and _same_bytes(one.read(name), other.read(name))


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    import torch

    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


# ------------------------------------------------------------------------------ an adapter, indexes


def _adapter(names: frozenset[str]) -> str:
    """The adapter that loaders find in the folder of a model; without its configuration they find none."""
    return next((name for name in ADAPTERS if name in names), "") if ADAPTER_CONFIG in names else ""


def _named(index: Path) -> frozenset[str]:
    """The files that an index names."""
    weights = _object(index).get("weight_map")
    return frozenset(map(str, weights.values())) if isinstance(weights, dict) else frozenset()


def _absent(place: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for index in sorted(place.glob(f"*{_folder.INDEX}")):
        lost = tuple(sorted(name for name in _named(index) if not (place / Path(name).name).is_file()))
        if lost:
            yield index.name, lost


def _total_size(place: Path, read: Iterable[Path]) -> int | None:
    """What the index of the files that were read says of the bytes of their tensors."""
    files = {path.name for path in read}
    for index in sorted(place.glob(f"*{_folder.INDEX}")):
        metadata = _object(index).get("metadata")
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        if _named(index) == files and isinstance(said, (int, float)):
            return int(said)
    return None


# ------------------------------------------------------------------------------ what a model is used with


def _sides(place: Path, template: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for kind, patterns in SIDES.items():
        found = [path.name for pattern in patterns for path in sorted(place.glob(pattern))]
        if kind == "a chat template" and template and not found:
            found = ["tokenizer_config.json"]
        yield kind, tuple(found)


def _template(place: Path, names: frozenset[str]) -> str:
    """The chat template, which lies in a file of its own or in the tokenizer's configuration."""
    if "chat_template.jinja" in names:
        try:
            return (place / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""
    said = _object(place / "chat_template.json").get("chat_template")
    said = said or _object(place / "tokenizer_config.json").get("chat_template")
    return said if isinstance(said, str) else ""
