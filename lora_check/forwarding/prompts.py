"""What the models are asked: lines or lists of a file, or the few prompts that come with the package, as token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from lora_check.errors import InputError, UsageError
from lora_check.forwarding.kinds import KINDS, Kind
from lora_check.forwarding.nouns import Asked

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Prompts and text as words, or prompts as ids; of ids the whole is the text too."""

    prompts: tuple[str, ...] = ()
    text: str = ""
    ids: tuple[tuple[int, ...], ...] = ()


def questions(prompts: str | None = None, text: str | None = None, ids: str | None = None) -> Questions:
    """What the files hold; where none is given, the prompts and the text of the package.

    raises   UsageError: prompts and ids both; InputError: a file that holds neither lines nor a list
    """
    if ids is not None:
        if prompts is not None or text is not None:
            raise UsageError("--ids stands in the place of --prompts and --text", hint="give one of them")
        return Questions(ids=tuple(_numbers(row, ids) for row in _rows(ids)))
    ours = json.loads((resources.files("lora_check") / "data" / "prompts.json").read_text(encoding="utf-8"))
    wanted = tuple(ours["prompts"]) if prompts is None else tuple(_line(row, prompts) for row in _rows(prompts))
    return Questions(prompts=wanted, text=ours["text"] if text is None else _read(text))


def _read(file: str) -> str:
    try:
        found = Path(file).read_text(encoding="utf-8-sig")  # with or without the mark of some editors
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise InputError(f"could not read {file}: {reason.lower()}", hint="give a text file") from error
    if not found.strip():
        raise InputError(f"{file} is empty", hint="give at least one line")
    return found


def _rows(file: str) -> list[object]:
    """The items of a JSON list, else the lines that are not empty."""
    found = _read(file)
    if not found.lstrip().startswith("["):
        return [line for line in found.split("\n") if line.strip()]
    try:
        rows = json.loads(found)
    except ValueError as error:
        if not re.match(r"\s*\[\s*[\"\[]", found):  # [INST] and the like begin a line, no list
            return [line for line in found.split("\n") if line.strip()]
        raise InputError(
            f"{file} begins as a JSON list and is none: {error}", hint="mend the list, or give one prompt a line"
        ) from error
    if not rows:
        raise InputError(f"{file} holds an empty list", hint="give at least one prompt")
    return list(rows)


def _line(row: object, file: str) -> str:
    if not isinstance(row, str) or not row:
        raise InputError(f"{file} holds {row!r}, which is no prompt", hint="give a list of texts; --ids takes numbers")
    return row


def _numbers(row: object, file: str) -> tuple[int, ...]:
    """A row of token ids: a JSON list of numbers, or numbers in a line."""
    words = re.split(r"[\s,]+", row.strip(" \t,")) if isinstance(row, str) else row
    known = isinstance(words, list) and words and all(re.fullmatch(r"[0-9]{1,9}", str(one)) for one in words)
    if not known or not isinstance(words, list):
        raise InputError(
            f"{file} holds {row!r}, which is no row of token ids", hint="whole numbers, one sequence a line"
        )
    return tuple(int(str(one)) for one in words)


def asked(
    wanted: Questions,
    encode: Encode | None,
    *,
    context: int | None,
    vocabulary: int | None,
    tokens: int,
    kind: Kind = KINDS[0],
) -> tuple[Asked, ...]:
    """Every prompt and the text as ids that fit into the context.

    context      positions the models have; None: it is not said      tokens   room for these is left after a prompt
    vocabulary   ids that the models know; None: it is not said
    raises       InputError: words without a tokenizer, or ids that the models do not have
    """
    tokens = tokens if kind.talks else 0
    if context is not None and tokens >= context:
        raise UsageError(f"--tokens {tokens} leaves no room in a context of {context}", hint="ask for fewer tokens")
    if encode is None and not wanted.ids:
        raise InputError("BASE has no tokenizer to encode the prompts with", hint="give token ids: --ids FILE")
    whole = [(tuple(ids), "") for ids in wanted.ids] or [(tuple(encode(one)), one) for one in wanted.prompts]  # type: ignore[misc]
    read = [*wanted.ids] if wanted.ids else [tuple(encode(wanted.text))]  # type: ignore[misc]
    _refuse_unknown([*(ids for ids, _ in whole), *read], vocabulary)
    room = None if context is None else context - tokens
    found = (
        *(_fitted(ids, room, text=text) for ids, text in whole if tokens or not wanted.ids),
        *(_read_only(ids, context, kind) for ids in read if len(ids) > 1 or not kind.talks),
    )
    if not found:
        raise InputError("no sequence has two tokens, and none is continued", hint="give longer ones, or --tokens 1")
    return found


def _read_only(ids: Sequence[int], room: int | None, kind: Kind) -> Asked:
    """The text; where one half is to be read and the other answered, each of them has the whole context."""
    fitted = _fitted(ids, room and room * (2 if kind.splits else 1), goes_on=False)
    return replace(fitted, split=len(fitted.ids) // 2) if kind.splits else fitted


def _fitted(ids: Sequence[int], room: int | None, *, text: str = "", goes_on: bool = True) -> Asked:
    kept = tuple(ids[:room])
    return Asked(ids=kept, text=text, goes_on=goes_on, cut=len(ids) - len(kept))


def _refuse_unknown(rows: Sequence[Sequence[int]], vocabulary: int | None) -> None:
    if any(not row for row in rows):
        raise InputError("a prompt has no token at all", hint="give prompts that are not empty")
    highest = max(max(row) for row in rows)
    if vocabulary is not None and highest >= vocabulary:
        raise InputError(
            f"token {highest} is asked for, and BASE has tokens 0 to {vocabulary - 1}", hint="give ids that it knows"
        )
