"""An honest merge is never refuted, whoever made it and in whatever order; a merge that is wrong by a hair is.

The producers are written here from the descriptions of the orders, in plain torch and NumPy: they merge whole tensors,
in their own shapes, and share nothing with the code that judges them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lora_check import ball as ball_module
from lora_check import registry
from lora_check.compare import Match, Measure, compare, reproduces
from lora_check.rounding import arithmetics
from lora_check.types import Arithmetic, Case, LoadedStep, Scale

torch.set_num_threads(1)

RECIPES = registry.load("recipes")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 2e-5)
R, ALPHA = 6, 15.0

# ------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Layer:
    """A kind of layer: its recipes, the shape of its weight, whether PEFT stores its delta, the axis DoRA counts on."""

    recipes: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    stores: bool = False
    dora: int | None = None
    adapters: int = 1


LAYERS = {
    "linear": Layer(("lora-linear",), (24, 40), "linear"),
    "in-out": Layer(("lora-linear-in-out",), (40, 24), "transposed"),
    "embedding": Layer(("lora-embedding",), (40, 24), "embedding", stores=True),
    "conv": Layer(("lora-conv",), (16, 8, 3, 2), "conv"),
    "bias": Layer(("lora-bias",), (300,), "bias"),
    "mha-out": Layer(("lora-mha-out", "lora-linear"), (28, 28), "linear"),
    "dora-linear": Layer(("dora-linear",), (24, 40), "linear", dora=0),
    "dora-in-out": Layer(("dora-linear-in-out",), (40, 24), "transposed", dora=1),
    "dora-embedding": Layer(("dora-embedding",), (40, 24), "embedding", dora=1),
    "dora-conv": Layer(("dora-conv",), (16, 8, 3, 2), "conv", dora=0),
    "two-linear": Layer(("lora-linear",), (24, 40), "linear", adapters=2),
    "two-embedding": Layer(("lora-embedding",), (40, 24), "embedding", stores=True, adapters=2),
}


@dataclass(frozen=True)
class Adapter:
    """Factors in float32 and their scale."""

    a: Tensor | None
    b: Tensor
    scale: Scale
    m: Tensor | None = None

    @property
    def s(self) -> float:
        return self.scale.value


@dataclass(frozen=True)
class World:
    """A base as stored, the adapters merged into it in turn, and what the merge is about."""

    layer: Layer
    base: Tensor
    adapters: tuple[Adapter, ...]

    def case(self, storage: str) -> Case:
        prefix = "embedding_" if self.layer.kind == "embedding" else ""
        steps = []
        for one in self.adapters:
            roles = {"bias": one.b} if one.a is None else {f"{prefix}A": one.a, f"{prefix}B": one.b}
            roles |= {} if one.m is None else {"m": one.m}
            steps += [LoadedStep(recipe=RECIPES[name], factors=roles, scale=one.scale) for name in self.layer.recipes]
        return Case(base=rows_of(self.base), steps=tuple(steps), storage=storage)


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1)


SCALES = (
    Scale(alpha=ALPHA, rank=R, default_alpha=ALPHA, default_rank=R),
    Scale(alpha=ALPHA, rank=R, rule="alpha/sqrt(r)", default_alpha=ALPHA, default_rank=R),
    Scale(alpha=1.0, rank=R, default_alpha=1.0, default_rank=R),
)


def weights(shape: tuple[int, ...], spread: str, rng: torch.Generator) -> Tensor:
    """Weights as trained ones are; or of every size, some of them zero, some far below what fp16 can hold."""
    w = torch.randn(shape, generator=rng) * {"even": 0.02, "small": 0.002, "wild": 0.02}[spread]
    if spread == "wild":
        w = w * 10.0 ** (-9 * torch.rand(shape, generator=rng).pow(3))
        w = torch.where(torch.rand(shape, generator=rng) < 0.02, torch.zeros(()), w)
    return w


def make(name: str, base: str, size: float, seed: int, spread: str = "even", shape: tuple[int, ...] = ()) -> World:
    """A base in its dtype, and adapters whose deltas are `size` times as long as it."""
    layer = LAYERS[name]
    layer = replace(layer, shape=shape or layer.shape)
    rng = torch.Generator().manual_seed(seed)
    weight = weights(layer.shape, spread, rng).to(DTYPES[base])
    adapters = tuple(_adapter(layer, weight.float(), size, SCALES[(seed + i) % 3], rng) for i in range(layer.adapters))
    return World(layer, weight, adapters)


def _adapter(layer: Layer, weight: Tensor, size: float, scale: Scale, rng: torch.Generator) -> Adapter:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    if layer.kind == "bias":
        b = randn(*layer.shape)
        return Adapter(None, b * (size * weight.norm() / (scale.value * b).norm()), scale)
    if layer.kind == "conv":
        a, b = randn(R, *layer.shape[1:]), randn(layer.shape[0], R, *(1 for _ in layer.shape[2:]))
    elif layer.kind == "linear":
        a, b = randn(R, layer.shape[1]), randn(layer.shape[0], R)
    else:
        a, b = randn(R, layer.shape[0]), randn(layer.shape[1], R)
    a = a * 0.05
    b = b * (size * weight.norm() / (scale.value * product(layer.kind, a, b)).norm())
    m = None
    if layer.dora is not None:
        m = lengths(weight, layer.dora) * (1 + size * randn(layer.shape[layer.dora]).abs())
        m = m.reshape(1, -1, *(1 for _ in layer.shape[2:])) if layer.kind == "conv" else m
    return Adapter(a, b, scale, m)


# --------------------------------------------------------------------------------------------- honest producers


def product(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """B A as each layer lays it out, in the dtype of the factors."""
    if kind == "linear":
        return b @ a
    if kind == "conv":
        return F.conv2d(a.transpose(0, 1), b).transpose(0, 1)
    return (b @ a).T


def lengths(v: Tensor, axis: int) -> Tensor:
    """The norm over every axis but one."""
    return torch.linalg.vector_norm(v, dim=tuple(i for i in range(v.ndim) if i != axis))


def along(x: Tensor, axis: int, like: Tensor) -> Tensor:
    return x.reshape(tuple(-1 if i == axis else 1 for i in range(like.ndim)))


def accumulated(kind: str, w: Tensor, a: Tensor, b: Tensor, s: float, seed: int) -> Tensor:
    """One float32 accumulation that begins at the base, the scale folded into B, the ranks in random order."""
    total = w.float().clone()
    for k in np.random.default_rng(seed).permutation(a.shape[0]):
        one, other = a[k : k + 1], b[:, k : k + 1] * s
        total = total + product(kind, one, other)
    return total


def cut(x: Tensor, how: str) -> Tensor:
    """Keep ten explicit mantissa bits, as tensor cores do: drop the others, or round them off to nearest."""
    bits = x.contiguous().view(torch.int32)
    if how == "rounded":
        bits = bits + 0x0FFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32)


def once(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """float64 to a stored dtype with one rounding, which torch does not do for 16-bit formats."""
    name = str(dtype).removeprefix("torch.")
    return torch.from_numpy(oracle.round_to(x, SHORT[name]) if name in SHORT else x).to(dtype)


@dataclass(frozen=True)
class Style:
    """A producer: how it makes one delta and adds it to a weight of the model's dtype."""

    factors: Callable[[Tensor, torch.dtype], Tensor] = lambda x, dtype: x
    wide: torch.dtype = torch.float32
    stores_delta: bool = False
    stores_layer: bool = True
    all_narrow: bool = False
    narrow_product: bool = False
    through: torch.dtype | None = None
    fused: int | None = None
    prescaled: bool = False
    matmul_only: bool = False
    lands: Callable[[Tensor, torch.dtype], Tensor] = lambda x, dtype: x.to(dtype)


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


STYLES: dict[str, dict[str, Style]] = {
    "fp32-add": {"peft": Style()},
    "rounded-delta": {"safe-merge": Style(stores_delta=True)},
    "rounded-factors": {"low-cpu-mem": Style(factors=narrow)},
    "rounded-factors-and-delta": {"no-autocast": Style(factors=narrow, stores_delta=True)},
    "storage-matmul": {"peft-0.7": Style(factors=lambda x, dtype: x.to(dtype), all_narrow=True, stores_delta=True)},
    "prescaled-factor": {
        "torchtune": Style(factors=lambda x, dtype: x.to(dtype), all_narrow=True, stores_delta=True, prescaled=True)
    },
    "storage-product": {
        "wide-after": Style(factors=lambda x, dtype: x.to(dtype), narrow_product=True, stores_layer=False)
    },
    "fp32-add-every-layer": {"plain": Style(stores_layer=False)},
    "through-fp16": {"half-then-bf16": Style(through=torch.float16)},
    # the weight they merge into is already in fp16: see `model_of`
    "held-in-fp16": {"peft": Style()},
    "held-in-fp16-rounded-delta": {"safe-merge": Style(stores_delta=True)},
    "fp64": {
        "rounded-once": Style(
            wide=torch.float64, stores_layer=False, lands=lambda x, dtype: once(x.double().numpy(), dtype)
        ),
        "rounded-by-torch": Style(wide=torch.float64, stores_layer=False),
    },
    "fp32-fused": {f"shuffled-{seed}": Style(stores_layer=False, fused=seed) for seed in (0, 1)},
    "tf32": {
        how: Style(factors=lambda x, dtype, how=how: cut(x, how), matmul_only=True) for how in ("rounded", "truncated")
    },
    "tf32-rounded-delta": {
        how: Style(factors=lambda x, dtype, how=how: cut(x, how), matmul_only=True, stores_delta=True)
        for how in ("rounded", "truncated")
    },
}


def merge_one(layer: Layer, w: Tensor, one: Adapter, style: Style, stores: bool) -> Tensor:
    """Merge one adapter into a weight of the model's dtype; the result is in that dtype again."""
    dtype = w.dtype
    wide = torch.promote_types(style.wide, dtype) if not style.all_narrow else dtype
    a = None if one.a is None else style.factors(one.a, dtype)
    b = one.b if style.matmul_only and a is None else style.factors(one.b, dtype)
    if style.fused is not None and a is not None:
        v = accumulated(layer.kind, w, a, b, one.s, style.fused).to(wide)
    else:
        computes = dtype if style.all_narrow or style.narrow_product else style.wide
        made = b.to(computes) if a is None else product(layer.kind, a.to(computes), b.to(computes))
        s = one.s
        if style.prescaled and one.a is not None:
            a, b, s = prescaled(layer, one, a, b, dtype)
            made = product(layer.kind, a, b)
        delta = (made.to(wide) if style.narrow_product else made) * s
        if style.stores_delta or (style.stores_layer and stores):
            delta = delta.to(dtype)
            v = w.to(wide) + delta.to(wide) if style.through else w + delta
        else:
            v = w.to(wide) + delta.to(wide)
    if one.m is not None and layer.dora is not None:
        m = one.m if style.matmul_only else style.factors(one.m, dtype)
        v = magnified(v, m.reshape(-1), layer.dora, dtype if style.stores_delta else v.dtype)
    if style.through:
        v = v.to(style.through)
    return style.lands(v, dtype)


def prescaled(layer: Layer, one: Adapter, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """The factors with the scale multiplied into one of them, B or an embedding's A, before that is stored."""
    if layer.kind == "embedding":
        return (one.a * one.s).to(dtype), b, 1.0
    return a, (one.b * one.s).to(dtype), 1.0


def magnified(v: Tensor, m: Tensor, axis: int, keeps: torch.dtype) -> Tensor:
    """(m / |V|) V, each intermediate kept in the dtype of V."""
    ratio = (m.to(torch.promote_types(m.dtype, v.dtype)) / lengths(v, axis).to(keeps)).to(keeps)
    return along(ratio, axis, v) * v


def merged(world: World, style: Style, storage: str, model: str) -> Tensor:
    """All adapters in turn, in a model of dtype `model`, saved as `storage`."""
    w = world.base.to(DTYPES[model])
    steps = list(itertools.product(world.adapters, world.layer.recipes))
    for index, (one, name) in enumerate(steps, start=1):
        # the output projection of a MultiheadAttention takes its delta twice, stored the first time
        stores = world.layer.stores or name == "lora-mha-out"
        w = merge_one(world.layer, w, one, style if index == len(steps) else replace(style, through=None), stores)
    return rows_of(w.to(DTYPES[storage]))


# (storage, base): the last ones, where they differ, are merged at either dtype
PAIRS = (
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "float32"),
    ("float64", "float64"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("float16", "bfloat16"),
    ("bfloat16", "float16"),
)


COMBINATIONS = [
    (name, storage, base, how)
    for name, (storage, base) in itertools.product(LAYERS, PAIRS)
    for how in arithmetics(storage, base)
]


def named(name: str, storage: str, base: str, how: Arithmetic) -> str:
    return f"{name}-{storage}-over-{base}-{how.name}"


# two delta sizes in turn where both dtypes are one. Else one, and every other layer in turn: the orders at the base's
# dtype are the same code
HONEST = [
    pytest.param(*one, (SIZES[i % 5], SIZES[(i + 2) % 5])[: 2 if one[1] == one[2] else 1], id=named(*one))
    for i, one in enumerate(COMBINATIONS)
    if one[1] == one[2] or (list(LAYERS).index(one[0]) + PAIRS.index(one[1:3])) % 2
]
FLOOR = [
    pytest.param(*one, id=named(*one))
    for one in COMBINATIONS
    if one[0] in ("linear", "embedding", "bias") and one[1] == one[2]
]


def own_name(how: Arithmetic) -> str:
    """The name of an order, whichever file's dtype it runs at."""
    return how.name.rpartition("-in-")[0] if how.load == "base" else how.name


def styles_of(how: Arithmetic) -> dict[str, Style]:
    return STYLES[own_name(how)]


def model_of(how: Arithmetic, storage: str, base: str) -> str:
    """The dtype that the model was loaded in: that of one of the files, or one by name."""
    return {"merged": storage, "base": base}.get(how.load, how.load)


def misses(world: World, actual: Tensor, storage: str, base: str, first: Arithmetic | None = None) -> str:
    """Nothing, or how far a merge was taken for a wrong one."""
    seen = compare(world.case(storage), actual, arithmetics(storage, base), first)
    return "" if seen.fits else f"{seen.over_budget} elements over budget, {seen.worst:.3g} times, as {seen.arithmetic}"


def test_every_order_has_a_producer_here():
    assert {own_name(how) for storage, base in PAIRS for how in arithmetics(storage, base)} == set(STYLES)


@pytest.mark.parametrize(("name", "storage", "base", "how", "sizes"), HONEST)
def test_an_honest_merge_is_never_refuted(name, storage, base, how, sizes):
    model = model_of(how, storage, base)
    wrong = {}
    for size in sizes:
        world = make(name, base, size, seed=SIZES.index(size))
        for style, producer in styles_of(how).items():
            actual = merged(world, producer, storage, model)
            wrong[size, style] = misses(world, actual, storage, base)
            if size == sizes[0]:
                wrong[size, style, "tried first"] = misses(world, actual, storage, base, first=how)
    assert not {key: value for key, value in wrong.items() if value}


@pytest.mark.parametrize("spread", ["small", "wild"])
@pytest.mark.parametrize(("name", "storage", "base", "how"), FLOOR)
def test_an_honest_merge_of_weights_near_the_floor_of_a_format_is_never_refuted(name, storage, base, how, spread):
    wrong, model = {}, model_of(how, storage, base)
    for size in (1e-2, 2e-5):
        shape = (4096,) if name == "bias" else (64, 96)
        world = make(name, base, size, seed=10, spread=spread, shape=shape)
        for style, producer in styles_of(how).items():
            wrong[size, style] = misses(world, merged(world, producer, storage, model), storage, base)
    assert not {key: value for key, value in wrong.items() if value}


# ----------------------------------------------------------------------------------- other machines, same order


def row_blocked(b: Tensor, a: Tensor) -> Tensor:
    return torch.cat([part @ a for part in b.split(7)])


def column_blocked(b: Tensor, a: Tensor) -> Tensor:
    return torch.cat([b @ part for part in a.split(13, dim=1)], dim=1)


def shuffled(b: Tensor, a: Tensor) -> Tensor:
    order = torch.randperm(a.shape[0], generator=torch.Generator().manual_seed(0))
    return b[:, order] @ a[order]


def split_in_two(b: Tensor, a: Tensor) -> Tensor:
    half = a.shape[0] // 2
    return b[:, :half] @ a[:half] + b[:, half:] @ a[half:]


def with_two_threads(b: Tensor, a: Tensor) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return b @ a
    finally:
        torch.set_num_threads(before)


def by_numpy(b: Tensor, a: Tensor) -> Tensor:
    return torch.from_numpy(np.einsum("or,ri->oi", b.numpy(), a.numpy(), optimize=False))


def one_by_one(b: Tensor, a: Tensor) -> Tensor:
    total = torch.zeros(b.shape[0], a.shape[1])
    for k in reversed(range(a.shape[0])):
        total += b[:, k : k + 1] * a[k]
    return total


MACHINES = {
    one.__name__.replace("_", "-"): one
    for one in (row_blocked, column_blocked, shuffled, split_in_two, with_two_threads, by_numpy, one_by_one)
}


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("size", [1e-1, 1e-3])
def test_another_machine_that_adds_up_in_another_order_is_never_refuted(storage, machine, size):
    world = make("linear", storage, size, seed=4, shape=(192, 256))
    one = world.adapters[0]
    delta = MACHINES[machine](one.b, one.a) * one.s
    w = world.base
    for actual in ((w.float() + delta).to(w.dtype), w + delta.to(w.dtype)):
        assert not misses(world, actual, storage, storage)
        assert not misses(world, actual, storage, storage, first=arithmetics(storage, storage)[0])


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("folded", ["into-a", "into-b", "addmm", "baddbmm"])
def test_a_scale_folded_into_a_factor_or_the_product_is_never_refuted(storage, folded):
    world = make("linear", storage, 1e-1, seed=5, shape=(192, 256))
    one, w = world.adapters[0], world.base.float()
    actual = {
        "into-a": lambda: w + one.b @ (one.a * one.s),
        "into-b": lambda: w + (one.b * one.s) @ one.a,
        "addmm": lambda: torch.addmm(w, one.b, one.a, alpha=one.s),
        "baddbmm": lambda: torch.baddbmm(w[None], one.b[None], one.a[None], alpha=one.s)[0],
    }[folded]()
    assert not misses(world, actual.to(world.base.dtype), storage, storage)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["linear", "embedding"])
@pytest.mark.parametrize("rank", [1, 64, 256])
def test_one_accumulation_over_base_and_many_ranks_is_never_refuted(rank, name, storage):
    world = make(name, storage, 1e-2, seed=7, shape=(32, 48))
    one = world.adapters[0]
    assert one.a is not None
    rng = torch.Generator().manual_seed(8)
    a, b = torch.randn(rank, one.a.shape[1], generator=rng), torch.randn(one.b.shape[0], rank, generator=rng)
    b = b * (1e-2 * world.base.float().norm() / (one.s * (b @ a)).norm())
    world = replace(world, adapters=(replace(one, a=a, b=b),))
    for style in STYLES["fp32-fused"].values():
        assert not misses(world, merged(world, style, storage, storage), storage, storage)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_where_base_and_delta_cancel_an_honest_merge_is_never_refuted(storage):
    # budgets counted in ulps of the tiny sum would refute thousands of elements here
    world = make("linear", storage, 1.0, seed=6, shape=(64, 96))
    one = world.adapters[0]
    delta = (one.b @ one.a) * one.s
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    world = replace(world, base=(-delta * (1 + noise)).to(DTYPES[storage]))
    for how in arithmetics(storage, storage):
        for style in styles_of(how).values():
            actual = merged(world, style, storage, model_of(how, storage, storage))
            assert not misses(world, actual, storage, storage), how.name


@pytest.mark.parametrize("storage", DTYPES)
def test_what_can_have_written_a_tensor_is_told_with_whether_it_gives_the_very_bits(storage):
    world = make("linear", storage, 1e-2, seed=9)
    case, orders = world.case(storage), arithmetics(storage, storage)
    right = merged(world, STYLES["fp32-add"]["peft"], storage, storage)
    assert reproduces(case, right, orders) == Match(orders[0], True)
    assert reproduces(replace(case, steps=()), right, orders) is None
    if storage == "float32":
        moved = torch.nextafter(right, right.new_tensor(math.inf))
        near = reproduces(case, moved, orders)
        assert near is not None
        assert not near.exact
    # bits of a later order come before an earlier order that only may have written them
    if storage in NARROW:
        safe = merged(world, STYLES["rounded-delta"]["safe-merge"], storage, storage)
        by_tensor_cores = next(how for how in orders if how.name == "tf32-rounded-delta")
        exact = next(how for how in orders if how.name == "rounded-delta")
        assert reproduces(case, safe, (by_tensor_cores,)) is not None
        assert reproduces(case, safe, (by_tensor_cores, exact)) in (
            Match(exact, True),
            Match(by_tensor_cores, True),
        )


# ------------------------------------------------------------------------------------------------------- power


@dataclass
class Told:
    """What the oracle's formulas say of a world in float64.

    reach    |s| |B| |A| of each element
    turned   how far each element goes with the norm it is divided by, if all of that norm is off by its `reach`
    """

    world: World
    merged: np.ndarray = field(init=False)
    reach: np.ndarray = field(init=False)
    turned: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        layer, one = self.world.layer, self.world.adapters[0]
        w, b = self.world.base.double().numpy(), one.b.double().numpy()
        self.turned = np.zeros_like(w)
        if one.a is None:
            self.merged, self.reach = w + one.s * b, np.abs(one.s * b)
        else:
            kind = {"transposed": "conv1d_t"}.get(layer.kind, layer.kind)
            a = one.a.double().numpy()
            times = len(layer.recipes)
            self.merged = w + times * oracle.DELTAS[kind](a, b, one.s)
            self.reach = times * oracle.DELTAS[kind](np.abs(a), np.abs(b), abs(one.s))
            if one.m is not None:
                off = oracle.lengths(self.reach, kind) / oracle.lengths(self.merged, kind)
                self.merged = oracle.dora(self.merged, one.m.double().numpy(), kind)
                self.turned = np.abs(self.merged) * off
        self.merged, self.reach, self.turned = (x.reshape(len(x), -1) for x in (self.merged, self.reach, self.turned))


def beyond(actual: Tensor, told: Told, storage: str, ulps: int = 1) -> Tensor:
    """The same tensor with the most plainly decidable element moved by some storage spacings, to the far side."""
    spacing = oracle.ulp(told.merged, SHORT[storage])
    seen = actual.double().numpy()
    # how far inside its cell the true value lies, less what any order can do to it by rounding deltas and factors
    room = 0.5 - np.abs(seen - told.merged) / spacing - 6 * UNIT[storage] * told.reach / spacing
    where = np.unravel_index(np.argmax(room), room.shape)
    assert room[where] > 0.1, "no element of this tensor is decidable"
    away = math.copysign(1, seen[where] - told.merged[where])
    moved = actual.clone()
    moved[where] = seen[where] + ulps * away * spacing[where]
    assert moved[where] != actual[where]
    return moved


SINGLE = [name for name, layer in LAYERS.items() if layer.adapters == len(layer.recipes) == 1]
NARROW = ("bfloat16", "float16")


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("storage", NARROW)
@pytest.mark.parametrize("name", SINGLE)
def test_one_element_moved_by_one_spacing_beyond_its_cell_is_refuted(name, storage, size):
    world = make(name, storage, size, seed=3)
    actual = merged(world, STYLES["fp32-add"]["peft"], storage, storage)
    case, orders = world.case(storage), arithmetics(storage, storage)
    assert compare(case, actual, orders).fits
    moved = beyond(actual, Told(world), storage)
    for first in (None, orders[0]):
        seen = compare(case, moved, orders, first)
        assert not seen.fits
        assert seen.over_budget == 1
        assert seen.worst > 1


@pytest.mark.parametrize("name", SINGLE)
def test_in_float32_one_element_is_refuted_once_it_leaves_what_tensor_cores_can_do(name):
    world = make(name, "float32", 1e-2, seed=3)
    told, actual = Told(world), merged(world, STYLES["fp32-add"]["peft"], "float32", "float32")
    case, orders = world.case("float32"), arithmetics("float32", "float32")
    assert compare(case, actual, orders).fits
    moved = actual.clone()
    where = np.unravel_index(np.argmax(np.abs(told.merged) / told.reach), told.merged.shape)
    # each factor can lose 2^-10 of its size there, so the delta about twice that, and a norm as much of all its terms
    moved[where] += 3 * 2.0**-10 * (told.reach + told.turned)[where] + 64 * 2.0**-24 * abs(told.merged[where])
    assert not compare(case, moved, orders).fits


@pytest.mark.parametrize(("storage", "factor"), [("float32", 1.0005), ("float32", 0.9995), ("float16", 1.002)])
@pytest.mark.parametrize("name", [name for name in SINGLE if LAYERS[name].dora is not None])
def test_a_magnitude_wrong_by_a_twentieth_of_a_percent_is_refuted_where_the_format_can_tell(name, storage, factor):
    world = make(name, storage, 1e-2, seed=3)
    one = world.adapters[0]
    wrong = replace(world, adapters=(replace(one, m=one.m * factor),))
    actual = merged(wrong, STYLES["fp32-add"]["peft"], storage, storage)
    assert not compare(world.case(storage), actual, arithmetics(storage, storage)).fits


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_scale_wrong_by_one_percent_is_refuted_at_a_delta_of_ten_percent(name, storage):
    world = make(name, storage, 1e-1, seed=2)
    orders = arithmetics(storage, storage)
    for index, how in enumerate(orders, start=list(LAYERS).index(name)):
        change = (1.01, 0.99)[index % 2]
        scaled = tuple(replace(one, scale=replace(one.scale, weight=change)) for one in world.adapters)
        wrong = replace(world, adapters=scaled)
        for style in styles_of(how).values():
            actual = merged(wrong, style, storage, model_of(how, storage, storage))
            assert not compare(world.case(storage), actual, orders, how).fits


def without_a_row(world: World) -> World:
    one = world.adapters[0]
    b = one.b.clone()
    b[5] = 0
    return replace(world, adapters=(replace(one, b=b), *world.adapters[1:]))


def without_a_rank(world: World) -> World:
    one = world.adapters[0]
    assert one.a is not None
    a = one.a.clone()
    a[3] = 0
    return replace(world, adapters=(replace(one, a=a), *world.adapters[1:]))


def with_ranks_confused(world: World) -> World:
    one = world.adapters[0]
    assert one.a is not None
    return replace(world, adapters=(replace(one, a=one.a.roll(1, 0)), *world.adapters[1:]))


def not_merged(world: World) -> World:
    return replace(world, adapters=())


def without_the_last_adapter(world: World) -> World:
    return replace(world, adapters=world.adapters[:-1])


MISTAKES = (without_a_row, without_a_rank, with_ranks_confused, not_merged, without_the_last_adapter)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "bias"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one.__name__.replace("_", "-"))
def test_a_merge_that_left_something_out_is_refuted(mistake, name, storage):
    for size in (1e-1, 1e-3):
        world = make(name, storage, size, seed=1)
        actual = merged(mistake(world), STYLES["fp32-add"]["peft"], storage, storage)
        assert not compare(world.case(storage), actual, arithmetics(storage, storage)).fits


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_counted_and_refuted(storage, value):
    world = make("linear", storage, 1e-2, seed=1)
    actual = merged(world, STYLES["fp32-add"]["peft"], storage, storage)
    actual[3, 4] = actual[7, 8] = value
    orders = arithmetics(storage, storage)
    for first in (None, orders[0]):
        seen = compare(world.case(storage), actual, orders, first)
        assert not seen.fits
        assert not seen.exact
        assert seen.nonfinite == 2


# -------------------------------------------------------------------------------------------- can these tests fail?


def widen(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """Make every rounding that a ball accounts for so many times as large."""
    true, rounded = ball_module.gamma, ball_module.Ball._rounded
    monkeypatch.setattr(ball_module, "gamma", lambda terms, u: times * true(terms, u))
    monkeypatch.setattr(
        ball_module.Ball,
        "_rounded",
        lambda self, mid, rad: rounded(self, mid, rad).widened(times * self.u),
    )


def judged(storage: str, size: float) -> Measure:
    world = make("linear", storage, size, seed=3)
    actual = merged(world, STYLES["fp32-add"]["peft"], storage, storage)
    orders = arithmetics(storage, storage)
    return compare(world.case(storage), beyond(actual, Told(world), storage), orders, orders[0])


def test_control_balls_far_too_wide_let_a_moved_element_of_bf16_pass(monkeypatch):
    assert not judged("bfloat16", 1e-3).fits
    widen(monkeypatch, 1e6)
    assert judged("bfloat16", 1e-3).fits


def test_control_balls_far_too_wide_let_a_moved_element_of_fp16_pass(monkeypatch):
    assert not judged("float16", 1e-3).fits
    widen(monkeypatch, 1e4)
    assert judged("float16", 1e-3).fits


def test_control_balls_without_width_refute_an_honest_merge_of_another_machine(monkeypatch):
    world = make("linear", "float32", 1e-1, seed=4, shape=(192, 256))
    one = world.adapters[0]
    actual = world.base + one_by_one(one.b, one.a * one.s)
    orders = tuple(how for how in arithmetics("float32", "float32") if how.name in ("fp32-add", "fp64"))
    assert compare(world.case("float32"), actual, orders).fits
    monkeypatch.setattr(ball_module, "gamma", lambda terms, u: 0.0)
    monkeypatch.setattr(ball_module.Ball, "_rounded", lambda self, mid, rad: ball_module.Ball(mid, rad, self.u))
    assert not compare(world.case("float32"), actual, orders).fits


def test_control_the_producers_differ_from_one_another():
    world = make("linear", "bfloat16", 1e-1, seed=0, shape=(64, 96))
    made = {
        how.name: merged(world, style, "bfloat16", model_of(how, "bfloat16", "bfloat16"))
        for how in arithmetics("bfloat16", "bfloat16")
        for style in list(styles_of(how).values())[:1]
    }
    assert set(made) == set(STYLES)
    alike = {"fp32-add", "fp32-add-every-layer", "fp64", "fp32-fused"}
    held = {"through-fp16", "held-in-fp16"}  # these weights are bf16 numbers that fp16 has too
    for one, other in itertools.combinations(made, 2):
        same = torch.equal(made[one], made[other])
        assert {one, other} <= alike or {one, other} <= held or not same, (one, other)


def test_control_a_model_held_in_fp16_is_another_than_a_sum_through_fp16_where_fp16_cannot_hold_the_base():
    world = make("linear", "bfloat16", 1e-3, seed=10, spread="wild", shape=(64, 96))
    held = merged(world, STYLES["held-in-fp16"]["peft"], "bfloat16", "float16")
    through = merged(world, STYLES["through-fp16"]["half-then-bf16"], "bfloat16", "bfloat16")
    assert not torch.equal(held, through)
