"""Two models in step: every module of the merged one is given what the unmerged one gives it, and must answer the same.

replayed   (merged model, Record) -> the modules that depart

Each module's input and output is replaced by the recorded one, so that what it rounds does not reach the next: a
module that departs does so by itself. What no adapter touches has to answer the same bits; a matrix that it multiplies
with may sum in another order. What the code between the modules makes of the same outputs has to be the same bits too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_check.forwarding.bounds import of_store, of_sums, sureness
from lora_check.forwarding.nouns import Departure, Lockstep
from lora_check.oracles.expecting import matrix, terms_of, through
from lora_check.oracles.recording import Call, Record, filled, hooked, tensors
from lora_check.renderers._words import many

LOGITS = "the logits"
"""What the model itself answers, which no module of it does."""
UNFINITE = "another, where the unmerged model's is not finite"


@dataclass(slots=True)
class _Tally:
    """What the replay of all sequences has found."""

    narrower: bool
    departures: dict[tuple[str, str], Departure] = field(default_factory=dict)
    overlap: dict[str, float] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, one: Departure) -> None:
        """Keep the first place of each module, and the largest size."""
        known = self.departures.setdefault((one.place, one.how), one)
        if one.size > known.size and one.order != known.order:
            self.departures[one.place, one.how] = _larger(known, one)


def _larger(known: Departure, one: Departure) -> Departure:
    return replace(one, order=min(known.order, one.order), sure=known.sure or one.sure)


def replayed(
    model: Any, sequences: Sequence[Any], run: Callable[[Any, Any], Tensor], record: Record, *, narrower: bool
) -> Lockstep:
    """Run the merged model over the same sequences, each module on what the unmerged one gave it.

    narrower   the models are not in the dtype that MERGED is stored in, which is coarser than BASE's: untouched modules
               round too, and how much is not derived
    """
    parts = dict(model.named_modules())
    tally = _Tally(narrower)
    for place, (ids, calls, logits) in enumerate(zip(sequences, record.runs, record.logits, strict=True)):
        start = place << 32
        waiting: dict[str, deque[tuple[int, Call]]] = {}
        for order, call in enumerate(calls, start=start):
            waiting.setdefault(call.name, deque()).append((order, call))
        known = {name: parts[name] for name in record.names if name in parts}
        with hooked(known, lambda name, w=waiting: _Replayer(name, w.get(name, deque()), record, tally)):  # type: ignore[misc]
            actual = run(model, ids)
        for name, left in waiting.items():
            if left:
                says = f"is called {many(len(left), 'time')} less than in the unmerged model"
                tally.add(Departure(place=name, how="calls", order=left[0][0], says=says))
        if not _same(actual, logits):
            says = f"{tuple(actual.shape)}, {tuple(logits.shape)} of the unmerged model"
            size = (actual - logits).float().abs().max().item() if actual.shape == logits.shape else math.inf
            told = says if actual.shape != logits.shape else "made of the same numbers"
            tally.add(Departure(place=LOGITS, how="output", order=start + len(calls), size=size, says=told))
    arrivals = dict(_arrivals(tally, record))
    departures = sorted((_tied(one, parts) for one in tally.departures.values()), key=lambda one: one.order)
    ran = {call.name for calls in record.runs for call in calls}
    idle = tuple(name for name in record.names if name not in ran and _own(name, parts, ran))
    return Lockstep(modules=len(ran), departures=tuple(departures), arrivals=arrivals, idle=idle)


def _own(name: str, parts: Mapping[str, Any], ran: set[str]) -> bool:
    """Whether a module that nobody calls has parameters which no module that ran has: not so a dropout, or an alias."""
    if name not in parts:
        return False
    seen = {id(one) for other in ran if other in parts for one in parts[other].parameters()}
    return any(id(one) not in seen for one in parts[name].parameters())


def _tied(one: Departure, parts: Mapping[str, Any]) -> Departure:
    """The departure with the module that shares its weight, if there is one, and nothing else is said of it."""
    weight = None if one.says else getattr(parts.get(one.place), "weight", None)
    others = [name for name, part in parts.items() if name != one.place and getattr(part, "weight", None) is weight]
    return replace(one, says=f"shares its weight with {others[0]}") if weight is not None and others else one


def _arrivals(tally: _Tally, record: Record) -> Iterator[tuple[str, tuple[float, float]]]:
    """<answer - base's, effect> / <effect, effect> of each adapted matrix; one that is too far from 1 departs."""
    for name, linear in record.linear.items():
        energy = tally.energy.get(name, 0.0)
        if energy <= 0:
            continue
        lam = sureness(1, 1)
        share = 1 + tally.overlap[name] / energy
        budget = lam * math.sqrt(linear**2 + tally.spread[name]) / energy
        yield name, (share, budget)
        if not abs(share - 1) <= budget:  # also of NaN
            tally.add(
                Departure(
                    place=name,
                    how="arrival",
                    order=tally.first[name],
                    size=abs(share - 1),
                    budget=budget,
                    share=share,
                    sure=record.sure[name],
                )
            )


@dataclass(slots=True)
class _Replayer:
    name: str
    waiting: deque[tuple[int, Call]]
    record: Record
    tally: _Tally
    now: list[tuple[int, Call] | None] = field(default_factory=list)

    def before(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Compare what the code around the module gives it, and give it what was recorded."""
        if not self.waiting:
            self.now.append(None)
            self.tally.add(Departure(place=self.name, how="calls", order=-1, says="is called more often"))
            return args, kwargs
        order, call = self.waiting.popleft()
        self.now.append((order, call))
        got = tuple(tensors((args, kwargs)))
        if len(got) != len(call.given) or any(a.shape != b.shape for a, b in zip(got, call.given, strict=False)):
            self._glue(order, math.inf)
            return args, kwargs
        if not all(_same(a, b) for a, b in zip(got, call.given, strict=True)):
            self._glue(order, max(_apart(a, b) for a, b in zip(got, call.given, strict=True)))
        return filled((args, kwargs), call.given)  # type: ignore[no-any-return]

    def _glue(self, order: int, size: float) -> None:
        around = self.name.rpartition(".")[0] or "the model"
        says = f"what it gives to {self.name.rpartition('.')[2]}"
        self.tally.add(Departure(place=around, how="input", order=order, size=size, says=says))

    def after(self, module: Any, args: Any, output: Any) -> Any:
        """Compare the answer, and pass on the recorded one."""
        now = self.now.pop()
        if now is None:
            return output
        order, call = now
        got = tuple(tensors(output))
        if len(got) != len(call.answered) or any(a.shape != b.shape for a, b in zip(got, call.answered, strict=True)):
            says = f"of shape {_shapes(got)}, {_shapes(call.answered)} in the unmerged model"
            self.tally.add(Departure(place=self.name, how="output", order=order, size=math.inf, says=says))
            return output
        self._judge(order, call, module, got)
        return filled(output, call.answered)

    def _judge(self, order: int, call: Call, module: Any, got: Sequence[Tensor]) -> None:
        if call.true is not None and not (_finite(call.answered[0]) and _finite(call.true)):
            if not _same(got[0], call.answered[0]):
                self.tally.add(
                    Departure(place=self.name, how="output", order=order, size=math.inf, sure=False, says=UNFINITE)
                )
        elif call.true is not None:
            self._adapted(order, call, module, got[0])
        elif not all(_same(a, b) for a, b in zip(got, call.answered, strict=True)):
            size, budget = _untouched(module, call, got)
            touched = self.name in self.record.adapted
            if not size <= budget:
                sure = not touched and not self.tally.narrower
                self.tally.add(
                    Departure(place=self.name, how="output", order=order, size=size, budget=budget, sure=sure)
                )

    def _adapted(self, order: int, call: Call, module: Any, got: Tensor) -> None:
        assert call.true is not None
        assert call.allowed is not None
        assert call.effect is not None
        apart = got.float() - call.true
        stored = of_store(got, getattr(module, "bias", None), _dtype(got))
        budget = call.allowed + stored
        over = (apart.abs() / budget).nan_to_num(nan=math.inf)
        over[apart == 0] = 0
        self._keep(order, call, apart, stored)
        if over.max() > 1:
            worst = int(over.argmax())
            self.tally.add(
                Departure(
                    place=self.name,
                    how="output",
                    order=order,
                    size=apart.abs().reshape(-1)[worst].item(),
                    budget=budget.reshape(-1)[worst].item(),
                    sure=self.record.sure[self.name],
                )
            )

    def _keep(self, order: int, call: Call, apart: Tensor, stored: Tensor) -> None:
        """<apart, effect>, and the square of what the stores of the outputs can make of it."""
        assert call.effect is not None
        g, tally, name = call.effect.double(), self.tally, self.name
        rounded = (g * stored.double()).square().sum().item()
        tally.first.setdefault(name, order)
        tally.overlap[name] = tally.overlap.get(name, 0.0) + (g * apart.double()).sum().item()
        tally.energy[name] = tally.energy.get(name, 0.0) + g.square().sum().item()
        tally.spread[name] = tally.spread.get(name, 0.0) + rounded


def _untouched(module: Any, call: Call, got: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference, and what another order of the same sums can make there: nothing but of a matrix."""
    if len(got) != 1 or type(matrix(module)) in (type(None), nn.Embedding) or not _same_dtype(call, got):
        return max(_apart(a, b) for a, b in zip(got, call.answered, strict=True)), 0.0
    base, terms = matrix(module), terms_of(matrix(module))
    lam = sureness(got[0].numel(), terms)
    weight = base.weight.detach().float().abs()
    size = through(base, weight, call.given[0].float().abs())
    stored = of_store(got[0], base.bias, _dtype(got[0])) + of_store(call.answered[0], base.bias, _dtype(got[0]))
    budget = of_sums(terms, lam) * size + stored
    apart = (got[0].float() - call.answered[0].float()).abs()
    worst = int((apart - budget).nan_to_num(nan=math.inf).argmax())
    return apart.reshape(-1)[worst].nan_to_num(nan=math.inf).item(), budget.reshape(-1)[worst].item()


def _same_dtype(call: Call, got: Sequence[Tensor]) -> bool:
    return got[0].dtype == call.answered[0].dtype


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def _finite(one: Tensor) -> bool:
    return bool(one.isfinite().all())


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    if one.dtype == other.dtype and torch.equal(one, other):
        return 0.0
    return (one.double() - other.double()).abs().nan_to_num(nan=math.inf).max().item()


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(one.shape)) for one in tensors) or "nothing"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
