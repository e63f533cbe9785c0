"""transformers loads some tensors under other names than the file has, or in other pieces.

Since release 5 a table in transformers says for each architecture which tensors of a file are renamed, stacked (the
experts of a mixture), concatenated (gate and up), cut or turned over when they are loaded, and the reverse when they
are saved. An adapter names the loaded parameters; a file may have either set of names. The table is transformers' own.
It is asked only where names cannot be paired otherwise, for importing transformers costs more than checking a billion
parameters. Conversions that do more than move rows are not followed: their tensors stay unpaired.

Source: transformers.conversion_mapping, transformers.core_model_loading
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_check.layouts._transformers_table import Loaded, Table, loaded, table_of
from lora_check.types import Layout, Link, TensorMeta

Metas = Mapping[str, TensorMeta]
Members = Sequence[tuple[str, Loaded]]

_DIGITS = re.compile(r"\d+")


def memory(name: str, config: Mapping[str, Any]) -> str | None:
    """The name that transformers loads a tensor of that name under."""
    table = table_of(config)
    return loaded(name, table).memory if table else None


def links(metas: Metas, config: Mapping[str, Any]) -> tuple[Link, ...]:
    """Links of each tensor whose conversion only moves rows, and only where the parameter's shape agrees."""
    table = table_of(config)
    if table is None:
        return ()
    groups: dict[str, list[tuple[str, Loaded]]] = {}
    for name in metas:
        one = loaded(name, table)
        groups.setdefault(one.memory, []).append((name, one))
    return tuple(link for key, members in groups.items() for link in _group(key, members, metas, table))


def _group(key: str, members: Members, metas: Metas, table: Table) -> Iterator[Link]:
    """The links of the tensors that are loaded under one name."""
    converter = members[0][1].converter
    if converter is None:
        if len(members) == 1:
            yield Link(file=members[0][0], memory=key)
        return
    steps = [type(one).__name__ for one in converter.operations]
    whole = table.parameters.get(key, ())
    if steps == ["Chunk"] and len(members) == 1 and converter.operations[0].dim == 0:
        yield from _chunks(key, members[0][0], converter, metas)
    elif steps == ["Transpose"] and len(members) == 1:
        yield from _turned(key, members[0][0], metas, whole)
    elif steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"], ["Concatenate"]):
        made = tuple(_stacked(key, members, steps, metas))
        if sum(metas[link.file].numel for link in made) == math.prod(whole):
            yield from made


def _chunks(key: str, name: str, converter: Any, metas: Metas) -> Iterator[Link]:
    """One tensor of the file that is cut into equal parameters."""
    targets, rows = converter.target_patterns, metas[name].shape[0]
    if rows % len(targets) == 0:
        size = rows // len(targets)
        for index, target in enumerate(targets):
            part = key.replace(targets[0], target)
            yield Link(file=name, memory=part, file_rows=(index * size, (index + 1) * size))


def _turned(key: str, name: str, metas: Metas, whole: tuple[int, ...]) -> Iterator[Link]:
    """One tensor whose last two axes are exchanged, where its shape shows it."""
    shape = metas[name].shape
    if (*shape[:-2], *shape[:-3:-1]) == whole:
        yield Link(file=name, memory=key, transposed=True)


def _stacked(key: str, members: Members, steps: Sequence[str], metas: Metas) -> Iterator[Link]:
    """Tensors that are stacked, one matrix for each expert, or laid below one another, or both."""
    by_pattern: dict[str, list[str]] = {}
    for name, one in members:
        by_pattern.setdefault(one.pattern, []).append(name)
    start = 0
    for pattern in members[0][1].converter.source_patterns:
        names = sorted(by_pattern.get(pattern, ()), key=_natural)
        if not names:
            return
        stop = start + metas[names[0]].shape[0]
        rows = (start, stop) if "Concatenate" in steps else None
        for index, name in enumerate(names):
            yield Link(file=name, memory=key, expert=index if "MergeModulelist" in steps else None, rows=rows)
        start = stop


def _natural(name: str) -> list[int]:
    """Numbers in their own order: expert 10 after expert 9."""
    return [int(one) for one in _DIGITS.findall(name)]


LAYOUT = Layout(name="transformers-names", links=links, memory=memory)
