"""What was given -> opened checkpoints and adapters. Headers only; no tensor library is imported to get here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

from lora_check.adapters.combine import combine
from lora_check.adapters.methods import methods
from lora_check.adapters.read import read_adapter
from lora_check.errors import UsageError, WrongInputError
from lora_check.links import realigned
from lora_check.locations import open_checkpoint
from lora_check.quantised import decoded
from lora_check.remote.place import shown_as
from lora_check.types import Adapter, Checkpoint


class Opened(NamedTuple):
    """The inputs of a check, headers read."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    merged: Checkpoint


@contextmanager
def opened_inputs(
    base: Any,
    adapters: Any,
    merged: Any,
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    base_file: Checkpoint | None = None,
    beside: Sequence[str] = (),
) -> Iterator[Opened]:
    """Open base, adapters and merged, headers only, and close them again.

    weights   a factor on each adapter's scale
    combination   how PEFT's add_weighted_adapter made one adapter of them; without it they are merged in turn
    base_file   the base, if it is open already; it stays open
    beside    patterns of further files that are wanted of adapters from the hub
    raises    UsageError, WrongInputError and the other InputErrors, naming the file and its role
    """
    given = list(adapters) if isinstance(adapters, (list, tuple)) else [adapters]
    if not given:
        raise UsageError("no adapter is given", hint="give BASE, one adapter or more, and MERGED")
    factors = [_weight(one) for one in weights] if weights is not None else [1.0] * len(given)
    if len(factors) != len(given):
        raise UsageError(
            f"{len(factors)} weights for {len(given)} adapters", hint="give one weight for each adapter, in their order"
        )
    _refuse_same(base, merged)
    with ExitStack() as stack:
        if base_file is None:
            base_file = stack.enter_context(closing(open_checkpoint(base, role="base")))
        adapter_files = [
            stack.enter_context(closing(open_checkpoint(one, role="adapter", beside=beside))) for one in given
        ]
        merged_file = stack.enter_context(closing(open_checkpoint(merged, role="merged")))
        _refuse_same_file(base_file, merged_file)
        read = [read_adapter(one, factor) for one, factor in zip(adapter_files, factors, strict=True)]
        _refuse_idle_weights(read)
        given_adapters = (combine(read, combination),) if combination else tuple(read)
        base_seen, merged_seen = decoded(base_file, merged_file)
        yield Opened(realigned(base_seen, merged_seen), given_adapters, merged_seen)


def is_weight(value: Any) -> bool:
    """Whether a value can be a factor on a scale: a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # false of NaN, and of a whole number beyond


def _weight(value: Any) -> float:
    """A factor on a scale, finite."""
    if not is_weight(value):
        raise UsageError(f"{value!r} is no weight", hint="give a finite number for each adapter")
    return float(value)


def _refuse_idle_weights(adapters: Sequence[Adapter]) -> None:
    """A weight is a factor on the scale, and some methods have none."""
    for adapter in adapters:
        method = adapter.config.method
        if adapter.weight != 1.0 and method in methods() and not methods()[method].alpha:
            raise UsageError(
                f"a weight of {adapter.weight} for {adapter.location}: {method} has no scale that it could multiply",
                hint="leave --weights out, or give 1 for this adapter",
            )


def _refuse_same(base: Any, merged: Any) -> None:
    if base is merged or (isinstance(base, str) and base == merged):
        named = shown_as(os.fspath(base)) if isinstance(base, (str, os.PathLike)) else ""
        raise _same(named or f"one {type(base).__name__} in memory")


def _refuse_same_file(base: Checkpoint, merged: Checkpoint) -> None:
    """Links and folders may hide that both names lead to one file."""
    ours, theirs = (tuple(getattr(one, "files", ())) for one in (base, merged))
    shared = [other for other in theirs if any(other.samefile(one) for one in ours)]
    if shared:
        raise _same(shared[0])


def _same(location: Any) -> WrongInputError:
    return WrongInputError(
        f"BASE and MERGED are the same checkpoint: {location}",
        hint="give the untouched base model first and the merged one last: BASE ADAPTER [ADAPTER ...] MERGED",
    )
