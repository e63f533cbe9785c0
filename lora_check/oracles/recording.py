"""What every module of the unmerged model is given and answers, call by call.

recorded   (unmerged model, sequences) -> Record
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of a module: tensors given, tensors answered, and for an adapted module what it has to answer.

    true     in fp32                                      effect   of the adapters: true - what the base answers
    allowed  of |actual - true|, but for the store of the output
    """

    name: str
    given: tuple[Tensor, ...]
    answered: tuple[Tensor, ...]
    true: Tensor | None = None
    effect: Tensor | None = None
    allowed: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class Record:
    """All calls in the order of execution, one list for each sequence; the adapted modules among their names.

    sure      adapted module -> whether its rounding is derived whole; absent: not at all
    linear    of each adapted matrix, what storage can make of <answer, effect>, but for lambda: |b c|_2, c the sum of
              effect_ti x_tj, and what stored factors add to its square
    """

    runs: list[list[Call]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    adapted: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    sure: dict[str, bool] = field(default_factory=dict)
    linear: dict[str, float] = field(default_factory=dict)

    def of(self, name: str) -> list[Call]:
        """The calls of one module."""
        return [call for run in self.runs for call in run if call.name == name]


def recorded(model: Any, sequences: Sequence[Any], run: Callable[[Any, Any], Tensor]) -> Record:
    """Run the unmerged model over the sequences; of whole PEFT layers only what goes in and comes out.

    model   a PeftModel          run   (model, sequence) -> logits
    """
    inner = model.get_base_model()
    parts = dict(_parts(inner))
    record = Record(adapted={name: one for name, one in parts.items() if _is_adapted(one)}, names=tuple(parts))
    for ids in sequences:
        copies = _Copies()
        with hooked(parts, lambda name, copies=copies: _Recorder(name, copies)):  # type: ignore[misc]
            record.logits.append(run(inner, ids))
        record.runs.append(copies.calls)
    return record


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules without modules of their own, and PEFT layers, which count as one."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_adapted(child) or _is_wrapped(child) or not any(True for _ in child.children()):
            yield path, child
        else:
            yield from _parts(child, f"{path}.")


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _is_wrapped(module: nn.Module) -> bool:
    """A module that was trained whole, or some rows of it, beside the one that it replaces: nothing of it rounds."""
    from peft.utils import other

    kinds = (getattr(other, name, ()) for name in ("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"))
    return any(isinstance(module, kind) for kind in kinds)


@contextmanager
def hooked(parts: Mapping[str, nn.Module], made: Callable[[str], Any]) -> Iterator[None]:
    """Inside, each part calls `before` and `after` of what `made` makes of its name."""
    handles = []
    for name, module in parts.items():
        one = made(name)
        handles += [
            module.register_forward_pre_hook(one.before, with_kwargs=True),
            module.register_forward_hook(one.after),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Copies:
    """The calls of one sequence. A tensor that several modules are given is copied once, unless somebody changes it."""

    calls: list[Call] = field(default_factory=list)
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, tree: Any) -> tuple[Tensor, ...]:
        return tuple(self._copy(one) for one in tensors(tree))

    def _copy(self, one: Tensor) -> Tensor:
        key = id(one), one._version
        if key not in self.known:
            copied = one.detach().clone()
            self.known[key] = one, copied  # `one` is kept too, so that no other tensor gets its id
            self.known[id(copied), copied._version] = copied, copied
        return self.known[key][1]


@dataclass(slots=True)
class _Recorder:
    name: str
    copies: _Copies
    given: list[tuple[Tensor, ...]] = field(default_factory=list)

    def before(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Keep copies, and let the module itself read them: the replay reads the same."""
        kept = self.copies.of((args, kwargs))
        self.given.append(kept)
        return filled((args, kwargs), kept)  # type: ignore[no-any-return]

    def after(self, module: Any, args: Any, output: Any) -> None:
        self.copies.calls.append(Call(name=self.name, given=self.given.pop(), answered=self.copies.of(output)))


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested mappings, tuples and lists, in their order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for one in tree.values():
            yield from tensors(one)
    elif isinstance(tree, (tuple, list)):
        for one in tree:
            yield from tensors(one)


def filled(tree: Any, values: Sequence[Tensor]) -> Any:
    """The same tree with other tensors in the places of its own."""
    rest = iter(values)

    def fill(one: Any) -> Any:
        if isinstance(one, Tensor):
            return next(rest)
        if type(one) is dict:
            return {key: fill(value) for key, value in one.items()}
        return type(one)(fill(value) for value in one) if type(one) in (tuple, list) else one

    return fill(tree)
