"""Frozen nouns of the latency benchmark and the shapes of its plug-ins; imports nothing of the benchmark.

    Cell      -> Subject    what is run: modules, their targets, their inputs      workloads/
    Subject   -> Timed      with one backend's modules in place of the targets     backends/
    Timed     -> Timing     seconds of one call, by one clock                      clocks/
    Timings   -> Row        beside the floor, with a verdict

Letters: T tokens of one forward, K inputs and N outputs of a module, r rank, n adapters in one batch; seconds, bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Phase = Literal["decode", "prefill"]
Cache = Literal["cold", "hot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One thing that is measured, under every backend.

    workload   the name of a workload                    shape     of a module, a block or a model: `shapes`
    batch      sequences                                 length    new tokens of each; T = batch * length
    context    tokens of each that are in the cache of keys and values already
    targets    the last names of the adapted modules     adapters  n, in turn over the sequences of the batch
    dtype      of base and activations                   cache     cold: weights come from memory, hot: from a cache
    """

    workload: str
    shape: str
    batch: int = 1
    length: int = 1
    context: int = 0
    rank: int = 16
    targets: tuple[str, ...] = ()
    adapters: int = 1
    dtype: str = "bfloat16"
    cache: Cache = "cold"

    @property
    def tokens(self) -> int:
        """T, of one forward."""
        return self.batch * self.length

    @property
    def phase(self) -> Phase:
        """One new token of each sequence is decoding; more are prefill."""
        return "decode" if self.length == 1 else "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where it runs.

    device   "cpu", "cuda" or "cuda:1"
    cache    bytes of the cache that has to be outrun: the L2 of a GPU, the last private one of a core
    """

    device: str
    cache: int

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.partition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Site:
    """One target module with its adapters, on the device: y = x W^T + s x A^T B^T, and the bias of the base.

    base   (N, K), bias or none      a (n, r, K)         b (n, N, r), in the dtype of the base
    s      alpha / r, not 1          chosen (batch,): the adapter of each sequence; None: the only one
    """

    base: nn.Linear
    a: Tensor
    b: Tensor
    s: float
    chosen: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to compute the forward of an adapted module.

    about      half a sentence for the table                     place    where it stands in tables
    build      a Site -> the module that stands in for its base: x (..., K) -> (..., N). The base is shared, not changed
    adapter    the dtype in which A and B are held; "" is that of the base
    one, many  whether it serves one adapter, and several in one batch
    missing    why it cannot run in a place, in words, else empty
    unfit      why modules (N, K) are too large for it in a place, in words, else empty
    merged     it is the yardstick: the adapter is in the weights
    traffic    what the unfused forward moves at least: a name of `floors`
    reference  (site, x) -> y and budget in float64 of a backend that computes another function; None: those of `budget`
    """

    name: str
    about: str
    place: int
    build: Callable[[Site], nn.Module]
    adapter: str = ""
    one: bool = True
    many: bool = False
    missing: Callable[[Place], str] = lambda _: ""
    unfit: Callable[[Sequence[tuple[int, int]], Place], str] = lambda *_: ""
    merged: bool = False
    traffic: str = "fused"
    reference: Callable[[Site, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """What a cell runs, on the device, with base layers in place of the targets.

    copies   equal in all but their numbers; calls go round them, so that no weight is found in a cache
    targets  the paths of the adapted modules in each copy
    sites    for each copy, target -> Site
    inputs   for each copy, the arguments of its forward: static buffers
    refill   writes other numbers into the inputs of every copy, by a seed
    call     one forward of a copy on its inputs -> the output; two calls on equal inputs give equal outputs
    """

    copies: tuple[nn.Module, ...]
    targets: tuple[str, ...]
    sites: tuple[Mapping[str, Site], ...]
    inputs: tuple[tuple[object, ...], ...]
    refill: Callable[[int], None]
    call: Callable[[nn.Module, tuple[object, ...]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A kind of subject: `make` builds that of a cell, `modules` lists the (N, K) of its targets without building it.

    missing    why a cell cannot run in a place, in words, else empty
    """

    name: str
    about: str
    place: int
    make: Callable[[Cell, Place], Subject]
    modules: Callable[[Cell], tuple[tuple[int, int], ...]]
    missing: Callable[[Cell, Place], str] = lambda *_: ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timed:
    """One backend in place: `calls` go round the copies. Nothing else may run on the device meanwhile."""

    name: str
    calls: tuple[Callable[[], Tensor], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """One notion of how long a call lasts.

    prepare  a Timed in a place -> a function that measures once: mean seconds of one call over a whole round of copies
    missing  why there is no such clock in a place, else empty
    """

    name: str
    about: str
    place: int
    prepare: Callable[[Timed, Place], Callable[[], float]]
    missing: Callable[[Place], str] = lambda _: ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one clock said of one backend: seconds in the order of the rounds, none where it is `missing`."""

    samples: tuple[float, ...] = ()
    missing: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Whether the numbers are right.

    share     the largest |y - y64| over its budget, of all elements: above 1, or NaN, the output is wrong
    bitwise   the output has the very bits of merged
    replayed  under graph replay, with other inputs: "same" bits as eager, "within" the budget, "wrong", "" not replayed
    wrong     in words; empty: it may be timed
    """

    share: float
    bitwise: bool = False
    replayed: str = ""
    wrong: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One backend in one cell. `again` is the A/A: merged, measured once more as if it were another backend.

    adapter, traffic   as its Backend has them
    """

    backend: str
    about: str
    adapter: str
    traffic: str = "fused"
    merged: bool = False
    again: bool = False
    missing: str = ""
    gate: Gate | None = None
    clocks: Mapping[str, Timing] = field(default_factory=dict)
    kernels: int | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device can do at most, measured in the same run.

    read, copy   bytes a second; a copy counts what is read and what is written
    matmul       dtype -> FLOP a second            launch   clock -> seconds of one empty kernel
    """

    read: float
    copy: float
    matmul: Mapping[str, float]
    launch: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A cell and all that was measured of it.

    modules   (N, K) of the targets                        merge   seconds of merging all targets on the device
    """

    cell: Cell
    modules: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]
    merge: Timing = field(default_factory=Timing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One run of the benchmark: the JSON file."""

    environment: Mapping[str, object]
    ceilings: Ceilings
    cells: tuple[Measured, ...]

    def __iter__(self) -> Iterator[Measured]:
        return iter(self.cells)
