"""Strips of a plain case, made and compared on a device while the next ones are on their way to it.

Two slots take turns. The host copies a strip of both files into pinned memory, from where it is uploaded on a stream of
its own; another stream waits for it, makes what the arithmetic writes, and counts what differs. What comes back is one
number for each strip. A device proves, and decides nothing else: a strip that it cannot make is asked of the processor.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_check.errors import UsageError
from lora_check.plain import Plain
from lora_check.reference import spans

CPU = "cpu"

SLOT_ELEMENTS = 1 << 23
"""Elements of a strip: 16 MiB in 16 bits, which a PCIe link carries in a third of a millisecond, far longer than a
kernel takes to start. Two slots of two files are 64 MiB of pinned memory."""

_HELD = threading.local()
_INTEGERS = {2: torch.int16, 4: torch.int32}


def demand(name: str) -> None:
    """Refuse a device that is not here.

    raises   UsageError
    """
    if not name.startswith(CPU) and not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UsageError(f"--device {name}: {built}", hint="leave --device out, or install a torch that finds the GPU")


def agreed(case: Plain, base: Any, actual: Any, rows: slice, name: str) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
    """Strip by strip of some rows: base, merged, and whether the device makes the very bits of it, all of them finite.

    base, actual   (rows, columns), or sources of rows, of the dtype of `case`
    name           'cuda' or 'cuda:1'; by another name of the processor, such as 'cpu:0', it goes the same way there
    """
    line = _line(name)
    factors, waiting = line.loaded(case, rows), deque[tuple[_Slot, slice, Tensor, Tensor]]()
    for index, span in enumerate(spans(rows, case.right.shape[1], SLOT_ELEMENTS)):
        if len(waiting) == len(line.slots):
            yield _answered(*waiting.popleft())
        strip = line.slots[index % len(line.slots)], span, base[span], actual[span].contiguous()
        strip[0].ask(case, factors, *strip[2:], slice(span.start - rows.start, span.stop - rows.start))
        waiting.append(strip)
    while waiting:
        yield _answered(*waiting.popleft())


def _answered(slot: _Slot, span: slice, base: Tensor, stored: Tensor) -> tuple[slice, Tensor, Tensor, bool]:
    return span, base, stored, slot.answer()


@dataclass(frozen=True, slots=True)
class _Factors:
    """L and R on the device, float32."""

    left: Tensor
    right: Tensor


@dataclass(slots=True)
class _Slot:
    """Memory for one strip of both files, on the host and on the device, and what is still to be heard of it."""

    device: torch.device
    upload: Any
    compute: Any
    held: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    found: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    done: Any = None

    def ask(self, case: Plain, factors: _Factors, base: Tensor, stored: Tensor, rows: slice) -> None:
        """Upload a strip and have it compared; returns before either has ended."""
        here = [self._uploaded(name, rows_of) for name, rows_of in (("base", base), ("stored", stored))]
        if self.upload is not None:
            self.compute.wait_stream(self.upload)
        with _on(self.compute):
            made = _made(case, factors.left[rows], factors.right, here[0])
            wrong = (_bits(made) != _bits(here[1])).sum() + (~here[1].isfinite()).sum()
            self.found.copy_(wrong.reshape(1), non_blocking=True)
            if self.compute is not None:
                self.done = self.compute.record_event()

    def answer(self) -> bool:
        """Wait for the last strip that was asked about."""
        if self.done is not None:
            self.done.synchronize()
        return not int(self.found)

    def _uploaded(self, name: str, strip: Tensor) -> Tensor:
        if self.upload is None:
            return strip
        shape, size = strip.shape, strip.numel()
        host, there = (self._memory(f"{name} {where}", strip, where) for where in ("host", "device"))
        host[:size].copy_(strip.reshape(-1))
        with _on(self.upload):
            there[:size].copy_(host[:size], non_blocking=True)
        return there[:size].view(shape)

    def _memory(self, name: str, strip: Tensor, where: str) -> Tensor:
        flat = self.held.get((name, strip.dtype))
        if flat is None or flat.numel() < strip.numel():
            place: dict[str, Any] = {"pin_memory": True} if where == "host" else {"device": self.device}
            flat = self.held[name, strip.dtype] = torch.empty(strip.numel(), dtype=strip.dtype, **place)
        return flat


@dataclass(frozen=True, slots=True)
class _Line:
    """Two slots that take turns; one line for each thread."""

    device: torch.device
    slots: tuple[_Slot, ...]

    def loaded(self, case: Plain, rows: slice) -> _Factors:
        """Some rows of L, and R, as the arithmetic multiplies them."""
        with _on(self.slots[0].compute):
            return _Factors(case.lefts(rows).to(self.device), case.rights().to(self.device))


def _line(name: str) -> _Line:
    """This thread's own line to a device."""
    lines: dict[str, _Line] = _HELD.__dict__.setdefault("lines", {})
    if name not in lines:
        device = torch.device(name)
        _exact_products(device.type)
        pair = (_stream(device), _stream(device))
        slots = []
        for _ in range(2):
            slot = _Slot(device, *pair)
            slot.found = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
            slots.append(slot)
        lines[name] = _Line(device, tuple(slots))
    return lines[name]


def _stream(device: torch.device) -> Any:
    """A stream of a GPU; the processor has none."""
    make: Any = torch.cuda.Stream
    return make(device) if device.type == "cuda" else None


@cache
def _exact_products(kind: str) -> None:
    """No TF32 in float32 products: it has 10 bits of them."""
    if kind == "cuda":
        torch.set_float32_matmul_precision("highest")


def _made(case: Plain, left: Tensor, right: Tensor, base: Tensor) -> Tensor:
    """W + s L R, in the order of the arithmetic: product, scale, perhaps a store, sum, store."""
    delta = (left @ right).mul_(case.s)
    if case.rounded:
        return base + delta.to(base.dtype)
    return (base.to(torch.float32) + delta).to(base.dtype)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGERS[x.element_size()])


def _on(stream: Any) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = torch.cuda.stream(stream) if stream is not None else nullcontext()
    return context
