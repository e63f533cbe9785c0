"""What a model is used with beside its tensors: configurations, tokenizer, templates, the code of its class.

All of it is BASE's, byte for byte, with two exceptions: config.json says what the merge changed, and the tokenizer is
the adapter's where the adapter changed the vocabulary and brings one. No weights, and nothing of an adapter's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

CONFIG = "config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")
"""Of these, the ones without which nothing can be tokenized."""

OTHERS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "processing_*.py",
    "image_processing_*.py",
    "LICENSE*",
    "NOTICE*",
)
BESIDE = (*TOKENIZER, *OTHERS)
DTYPE_KEYS = ("dtype", "torch_dtype")
"""What releases of transformers call the dtype of a model, the newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a merge changes of what a configuration says.

    dtype       of all floating tensors, where one was asked for
    vocabulary  rows of the embedding before and after, where an adapter brings another number
    decoded     BASE was quantised and is not any more
    untied      head and embedding are tensors of their own
    retold      an adapter trained tokens, so that its tokenizer is the one to use
    """

    dtype: str = ""
    vocabulary: tuple[int, int] | None = None
    decoded: bool = False
    untied: bool = False
    retold: bool = False


def companions(base: Path | None, adapters: Sequence[Path], changes: Changes) -> dict[str, Path]:
    """Name -> the file to be copied; config.json is not among them.

    base       the folder of BASE, if it has one          adapters   those of the adapters, in their order
    """
    found = {path.name: path for path in _matching(base, BESIDE)}
    brought = [mine for one in adapters if (mine := list(_matching(one, TOKENIZER)))]
    if not (changes.retold or changes.vocabulary) or not any(_is_tokenizer(mine) for mine in brought):
        return found
    chosen = [mine for mine in brought if _is_tokenizer(mine)][-1]
    kept = {name: path for name, path in found.items() if not _matches(name, TOKENIZER)}
    return kept | {path.name: path for path in chosen}


def _matching(folder: Path | None, patterns: Sequence[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder else ():
        if path.is_file() and _matches(path.name, patterns):
            yield path


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_tokenizer(files: Sequence[Path]) -> bool:
    """Whether these files can tokenize, and are not a template alone."""
    return any(_matches(path.name, VOCABULARIES) for path in files)


# ------------------------------------------------------------------------------ config.json


def configured(config: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """The configuration with the changes told, in the order of its keys; without any it says what it said."""
    told = {key: _inside(value, changes) for key, value in config.items()}
    if not config:
        return told
    if changes.dtype:
        told |= dict.fromkeys([key for key in DTYPE_KEYS if key in told] or [DTYPE_KEYS[0]], changes.dtype)
    if changes.untied:
        told["tie_word_embeddings"] = False
    if changes.decoded:
        told.pop("quantization_config", None)
    return _resized(told, changes)


def _inside(value: Any, changes: Changes) -> Any:
    """The configuration of a part of a model, such as `text_config`: only what it says already is changed."""
    if not isinstance(value, Mapping):
        return value
    told = dict(value)
    if changes.dtype:
        told |= {key: changes.dtype for key in DTYPE_KEYS if isinstance(told.get(key), str)}
    if changes.untied and "tie_word_embeddings" in told:
        told["tie_word_embeddings"] = False
    return _resized(told, changes)


def _resized(told: dict[str, Any], changes: Changes) -> dict[str, Any]:
    if changes.vocabulary and told.get("vocab_size") is not None:
        told["vocab_size"] = changes.vocabulary[1]
    return told


def config_bytes(before: Path | None, config: Mapping[str, Any], told: Mapping[str, Any]) -> bytes | None:
    """What goes into config.json: BASE's very bytes where nothing is changed; None where there is nothing to say."""
    if not told:
        return None
    if before is not None and told == config and (before / CONFIG).is_file():
        return (before / CONFIG).read_bytes()
    return (json.dumps(told, indent=2, ensure_ascii=False, default=str) + "\n").encode()


def folder_of(checkpoint: Any) -> Path | None:
    """The folder that the files of a checkpoint lie in; None for tensors in memory."""
    files: Sequence[Path] = getattr(checkpoint, "files", ())
    return files[0].parent if files else None
