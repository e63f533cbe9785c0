"""The right delta in the wrong place: what a script of ten lines writes is named, and its neighbours are not.

Every mistaken tensor is made whole, in torch, from what the page of the fault says; the forward models have no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from lora_check import diagnose, registry
from lora_check.compare import compare
from lora_check.rounding import arithmetics
from lora_check.types import Case, Comparison, LoadedStep, Peer, Plan, Scale, Site, Verdict

torch.set_num_threads(1)

RECIPES = registry.load("recipes")
FAULTS = registry.load("faults")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
IN, SIZE = 56, 0.05
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": IN}
MHA = {"num_attention_heads": 4, "hidden_size": 64}


def plain(rank: int, alpha: float = 20.0) -> Scale:
    return Scale(alpha=alpha, rank=rank, default_alpha=alpha, default_rank=rank)


@dataclass(frozen=True)
class Target:
    """A base tensor as stored and its factors in float32; windows: one pair of factors for each."""

    base: Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...]
    name: str = "model.layers.1.self_attn.q_proj.weight"
    config: Mapping[str, object] = field(default_factory=dict)
    windows: tuple[tuple[int, int] | None, ...] = (None,)
    parts: tuple[str, ...] = ()
    recipe: str = "lora-linear"
    peers: tuple[Peer, ...] = ()

    @property
    def scale(self) -> Scale:
        return plain(self.rank)

    @property
    def rank(self) -> int:
        return int(self.pairs[0][0].shape[0])

    @property
    def storage(self) -> str:
        return str(self.base.dtype).removeprefix("torch.")

    @property
    def steps(self) -> tuple[LoadedStep, ...]:
        parent = self.name.rsplit(".", 2)[0]
        own = [f"{parent}.{part}.weight" for part in self.parts] or [self.name]
        return tuple(
            LoadedStep(
                recipe=RECIPES[self.recipe],
                factors={"A": a, "B": b},
                scale=self.scale,
                window=window,
                site=Site(parameter=name, shape=tuple(self.base.shape), roles={"A": a.shape, "B": b.shape}),
            )
            for (a, b), window, name in zip(self.pairs, self.windows, own, strict=True)
        )

    @property
    def case(self) -> Case:
        return Case(
            base=self.matrix(self.base),
            steps=self.steps,
            storage=self.storage,
            name=self.name,
            module=self.name.removesuffix(".weight"),
            config=self.config,
            peers=self.peers,
        )

    def merged(self, *deltas: Tensor) -> Tensor:
        """Base plus deltas of the whole tensor, in float32, stored once."""
        total = self.base.float()
        for delta in deltas:
            total = total + delta.reshape(total.shape)
        stored = total.to(self.base.dtype)
        return self.matrix(stored)

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1]) if self.recipe == "lora-experts" else tensor.flatten(1)


def target(out: int, storage: str, *, rank: int = 6, seed: int = 0, inputs: int = IN, **more: object) -> Target:
    """A weight (out, in) and one pair of factors whose delta is a twentieth as long."""
    rng = torch.Generator().manual_seed(seed)
    base = (torch.randn(out, inputs, generator=rng) * 0.02).to(DTYPES[storage])
    return Target(base, (pair(out, inputs, rank, base.float().norm(), rng),), **more)  # type: ignore[arg-type]


def pair(out: int, inputs: int, rank: int, size: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(rank, inputs, generator=rng), torch.randn(out, rank, generator=rng)
    return a, b * (SIZE * size / (plain(rank).value * (b @ a)).norm())


def delta(one: Target, index: int = 0) -> Tensor:
    """s B A of one pair."""
    a, b = one.pairs[index]
    return one.scale.value * (b @ a)


def named(one: Target, actual: Tensor) -> diagnose.Diagnosis:
    """What a refuted tensor is told to be; it must be refuted first, and the right merge must not be."""
    case = one.case
    orders = arithmetics(case.storage, case.storage)
    seen = compare(case, actual, orders)
    assert not seen.fits, "the mistake was not even refuted"
    found = diagnose.name_tensor(one.name, "target", case, actual, orders, seen)
    assert found is not None
    return found


def healthy(one: Target, right: Tensor) -> bool:
    return compare(one.case, right, arithmetics(one.storage, one.storage)).fits


def told(found: diagnose.Diagnosis, code: str) -> Mapping[str, object]:
    assert found.codes == (code,), found
    return found.evidence[code]


both = pytest.mark.parametrize("storage", DTYPES)
narrow = pytest.mark.parametrize("storage", ["bfloat16"])
wide = pytest.mark.parametrize("storage", ["float32"])

# --------------------------------------------------------------------------------------------------------- rotary


def to_neighbours(rows: Tensor, size: int) -> Tensor:
    """Rows of two halves a head as pairs of neighbours."""
    heads = rows.split(size)
    return torch.cat([torch.stack([h[: size // 2], h[size // 2 :]], 1).reshape(size, -1) for h in heads])


def to_halves(rows: Tensor, size: int) -> Tensor:
    return torch.cat([torch.cat([h[0::2], h[1::2]]) for h in rows.split(size)])


@both
@pytest.mark.parametrize(("way", "layout"), [(to_neighbours, "interleaved"), (to_halves, "half-split")])
@pytest.mark.parametrize(("name", "rows"), [("q_proj", 64), ("k_proj", 32)])
def test_rows_in_the_other_rotary_layout(way, layout, name, rows, storage):
    one = target(rows, storage, name=f"model.layers.0.self_attn.{name}.weight", config=GQA)
    assert healthy(one, one.merged(delta(one)))
    found = named(one, one.merged(way(delta(one), 16)))
    assert told(found, "LC140")["layout"] == layout
    # in a head of another size, or in v, which is never rotated, it is not that
    assert "LC140" not in named(one, one.merged(way(delta(one), 32))).codes
    value = replace(one, name="model.layers.0.self_attn.v_proj.weight")
    assert "LC140" not in named(value, value.merged(way(delta(one), 16))).codes


@narrow
def test_only_the_rotated_rows_of_a_head_are_turned(storage):
    config = {**MHA, "partial_rotary_factor": 0.5}
    one = target(64, storage, name="layers.0.q_proj.weight", config=config)
    turned = torch.cat([torch.cat([to_neighbours(h[:8], 8), h[8:]]) for h in delta(one).split(16)])
    assert told(named(one, one.merged(turned)), "LC140")["layout"] == "interleaved"


@wide
def test_keys_turned_with_the_number_of_query_heads(storage):
    one = target(32, storage, name="layers.0.k_proj.weight", config=GQA)
    assert told(named(one, one.merged(to_neighbours(delta(one), 8))), "LC140")["layout"] == "interleaved"


@narrow
def test_the_query_and_key_rows_of_a_fused_tensor_are_turned(storage):
    one = target(128, storage, name="layers.0.qkv_proj.weight", config=GQA)
    q, k, v = delta(one).split([64, 32, 32])
    assert told(named(one, one.merged(torch.cat([to_halves(q, 16), to_halves(k, 16), v]))), "LC140")
    assert "LC140" not in named(one, one.merged(torch.cat([q, k, to_halves(v, 16)]))).codes


def test_without_a_configuration_nothing_is_known_of_heads():
    one = target(64, "float32", name="layers.0.q_proj.weight")
    assert named(one, one.merged(to_neighbours(delta(one), 16))).codes == ("LC199",)
    assert not FAULTS["LC140"].inject(replace(one.case, config={"num_attention_heads": 32, "head_dim": 2}))


# ---------------------------------------------------------------------------------------------------------- fused


def by_heads(rows: Tensor, heads: int) -> Tensor:
    """q|k|v of as many heads each, head by head."""
    parts = [part.chunk(heads) for part in rows.chunk(3)]
    return torch.cat([torch.cat([q, k, v]) for q, k, v in zip(*parts, strict=True)])


@both
@pytest.mark.parametrize("name", ["query_key_value", "c_attn", "in_proj_weight"])
def test_equal_parts_taken_head_by_head(name, storage):
    one = target(192, storage, name=f"layers.0.{name}.weight", config=MHA)
    assert healthy(one, one.merged(delta(one)))
    found = named(one, one.merged(by_heads(delta(one), 4)))
    assert told(found, "LC141")["order"] == "q|k|v taken for head by head"
    back = torch.empty_like(delta(one))
    back[by_heads(torch.arange(192.0)[:, None], 4)[:, 0].long()] = delta(one)
    assert told(named(one, one.merged(back)), "LC141")


@wide
def test_groups_of_queries_with_their_key_and_value(storage):
    one = target(128, storage, name="layers.0.Wqkv.weight", config=GQA)
    q, k, v = delta(one).split([64, 32, 32])
    groups = zip(q.chunk(2), k.chunk(2), v.chunk(2), strict=True)
    assert told(named(one, one.merged(torch.cat([torch.cat(group) for group in groups]))), "LC141")
    assert told(named(one, one.merged(torch.cat([q, v, k]))), "LC141")["order"] == "q|v|k"
    assert "LC141" not in named(one, one.merged(torch.cat([q, k, v.flip(0)]))).codes


@narrow
def test_an_in_out_weight_has_its_columns_permuted(storage):
    flat = target(192, storage, config=MHA)
    one = replace(flat, base=flat.base.T.contiguous(), name="h.0.attn.c_attn.weight", recipe="lora-linear-in-out")
    q, k, v = delta(one).chunk(3)
    assert healthy(one, one.merged(delta(one).T))
    assert told(named(one, one.merged(torch.cat([k, q, v]).T)), "LC141")["order"] == "k|q|v"


@narrow
@pytest.mark.parametrize(
    ("move", "order"),
    [
        (lambda g, u: torch.cat([u, g]), "up|gate"),
        (lambda g, u: torch.stack([g, u], 1).reshape(-1, IN), "in turn"),
        (lambda g, u: torch.stack([u, g], 1).reshape(-1, IN), "up and gate in turn"),
    ],
)
def test_gate_and_up_in_another_order(move, order, storage):
    one = target(80, storage, name="layers.0.mlp.gate_up_proj.weight")
    assert order in str(told(named(one, one.merged(move(*delta(one).chunk(2)))), "LC141")["order"])


def fused(sizes: Sequence[int], storage: str, parts: Sequence[str], name: str, config: Mapping[str, object]) -> Target:
    """A fused tensor whose parts have factors of their own."""
    one, rng = target(sum(sizes), storage, name=name, config=config), torch.Generator().manual_seed(5)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    pairs = tuple(pair(size, IN, 6, one.base.float().norm() / 2, rng) for size in sizes)
    windows = tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
    return replace(one, pairs=pairs, windows=windows, parts=tuple(parts))


def gates(storage: str) -> Target:
    return fused([40, 40], storage, ["gate_proj", "up_proj"], "layers.0.mlp.gate_up_proj.weight", {})


def attention(storage: str) -> Target:
    parts = ["q_proj", "k_proj", "v_proj"]
    return fused([64, 32, 32], storage, parts, "layers.0.self_attn.qkv_proj.weight", GQA)


@wide
def test_adapters_of_parts_in_a_fused_tensor(storage):
    one = gates(storage)
    gate, up = delta(one, 0), delta(one, 1)
    zero = torch.zeros_like(gate)
    assert healthy(one, one.merged(torch.cat([gate, up])))
    assert told(named(one, one.merged(torch.cat([up, gate]))), "LC141")["order"] == "up|gate"
    found = named(one, one.merged(torch.stack([gate, up], 1).reshape(-1, IN)))
    assert told(found, "LC141")["order"] == "gate|up taken for in turn"
    written = {
        "gate alone": torch.cat([gate, zero]),
        "up alone": torch.cat([zero, up]),
        "gate and up both in gate": torch.cat([gate + up, zero]),
        "up in the rows of gate": torch.cat([up, zero]),
        "gate and up in each other as well": torch.cat([gate + up, gate + up]),
    }
    for how, rows in written.items():
        assert told(named(one, one.merged(rows)), "LC142")["how"] == how
    stored = replace(one, base=one.merged(torch.cat([gate, zero])))
    found = named(one, stored.merged(torch.cat([up, zero])))
    assert found.codes == ("LC142",)
    assert "LC142" not in named(one, one.merged(torch.cat([1.3 * gate, up]))).codes


@wide
def test_one_of_three_adapters_left_out(storage):
    one = attention(storage)
    q, k, v = (delta(one, i) for i in range(3))
    assert healthy(one, one.merged(torch.cat([q, k, v])))
    assert told(named(one, one.merged(torch.cat([q, torch.zeros_like(k), v]))), "LC142")["how"] == "k left out"
    assert told(named(one, one.merged(torch.cat([q, v, k]))), "LC141")["order"] == "q|v|k"
    assert told(named(one, one.merged(torch.cat([q, k + v, torch.zeros_like(v)]))), "LC142")
    # the rotary order of adapters of parts: q and k turned, v not
    turned = torch.cat([to_neighbours(q, 16), to_neighbours(k, 16), v])
    assert told(named(one, one.merged(turned)), "LC140")["layout"] == "interleaved"


@narrow
def test_a_rank_divided_among_the_parts(storage):
    one = target(128, storage, rank=9, name="layers.0.qkv_proj.weight", config=GQA)
    a, b = one.pairs[0]
    rows = b.split([64, 32, 32])
    shares = torch.cat([rows[i][:, 3 * i : 3 * i + 3] @ a[3 * i : 3 * i + 3] for i in range(3)])
    assert told(named(one, one.merged(one.scale.value * shares)), "LC144")["parts"] == 3
    others = torch.cat([rows[i][:, 3 * (2 - i) : 9 - 3 * i] @ a[3 * (2 - i) : 9 - 3 * i] for i in range(3)])
    assert "LC144" not in named(one, one.merged(one.scale.value * others)).codes


# ---------------------------------------------------------------------------------------------- of another tensor


def peer_of(one: Target) -> Peer:
    return Peer(tensor=one.name, module=one.name.removesuffix(".weight"), steps=lambda: one.steps)


def family(names: Sequence[str], storage: str) -> dict[str, Target]:
    """Targets of one shape, each of which knows the others."""
    made = {name: target(24, storage, seed=i, name=name) for i, name in enumerate(names)}
    return {
        name: replace(one, peers=tuple(peer_of(other) for other in made.values() if other is not one))
        for name, one in made.items()
    }


@wide
def test_the_delta_of_another_module(storage):
    names = [f"layers.{n}.mlp.{leaf}.weight" for n in range(2) for leaf in ("gate_proj", "up_proj")]
    made = family(names, storage)
    one, other, further = made[names[0]], made[names[1]], made[names[3]]
    assert healthy(one, one.merged(delta(one)))
    evidence = told(named(one, one.merged(delta(other))), "LC145")
    assert (evidence["own"], evidence["of"], evidence["holds"]) == ("gate_proj", "up_proj", "layers.0.mlp.up_proj")
    assert FAULTS["LC145"].tell([evidence] * 3) == "gate_proj holds the delta of up_proj"
    # another module of another layer is neither
    assert not {"LC145", "LC146"} & set(named(one, one.merged(delta(further))).codes)


LAYERS = [f"model.layers.{n}.self_attn.o_proj.weight" for n in range(12)]


@pytest.mark.parametrize(
    ("order", "phrase"),
    [
        (lambda n: n - 1, "each layer holds the delta of the layer before it"),
        (lambda n: (n + 3) % 12, "each layer holds the delta of the layer 3 after it"),
        (lambda n: 11 - n, "deltas of the layers in reverse order"),
        (lambda n: sorted(range(12), key=str)[n], "deltas of the layers in the order of their names as text"),
        (lambda n: n % 6, "deltas of the layers counted anew in each of 2 parts"),
    ],
)
def test_the_delta_of_another_layer(order, phrase):
    made = family(LAYERS, "bfloat16")
    found = []
    for n in (2, 7, 8):
        one = made[LAYERS[n]]
        if order(n) != n:
            found.append(told(named(one, one.merged(delta(made[LAYERS[order(n)]]))), "LC146"))
            assert found[-1]["of"] == order(n)
    assert FAULTS["LC146"].tell(found) == phrase


def test_layers_without_a_rule_are_told_by_example():
    told_ = [{"own": 3, "of": 9, "orders": ["x"]}, {"own": 4, "of": 1, "orders": []}]
    assert FAULTS["LC146"].tell(told_) == (
        "layers hold one another's deltas (layer 3 holds the delta of layer 9 and layer 4 holds the delta of layer 1)"
    )


def test_a_twin_with_the_same_factors_is_no_mistake():
    one = target(24, "float32", name=LAYERS[0])
    twin = replace(one, name=LAYERS[1])
    assert not FAULTS["LC146"].inject(replace(one, peers=(peer_of(twin),)).case)


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_the_delta_of_another_expert(offset):
    names = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(16)]
    made = family(names, "bfloat16")
    one, other = made[names[5]], made[names[(5 + offset) % 16]]
    assert told(named(one, one.merged(delta(other))), "LC147")["of"] == (5 + offset) % 16


# --------------------------------------------------------------------------------------------------- stacks


E, R = 8, 3


def stack(storage: str) -> tuple[Target, Tensor, Tensor]:
    """A stack of experts (E, out, in), A (E, r, in) and B (E, out, r), packed as PEFT packs them."""
    rng = torch.Generator().manual_seed(3)
    base = (torch.randn(E, 20, IN, generator=rng) * 0.02).to(DTYPES[storage])
    a, b = torch.randn(E, R, IN, generator=rng), torch.randn(E, 20, R, generator=rng)
    b *= SIZE * base.float().norm() / (plain(R).value * torch.einsum("eor,eri->eoi", b, a)).norm()
    packed = (a.reshape(E * R, IN), b.permute(1, 2, 0).reshape(20, R * E))
    name = "layers.0.mlp.experts.gate_up_proj"
    return Target(base, (packed,), name=name, recipe="lora-experts"), a, b


class Stacked(Target):
    """The rank is that of one expert."""

    @property
    def rank(self) -> int:
        return R


def stacked(storage: str) -> tuple[Target, Tensor, Tensor]:
    one, a, b = stack(storage)
    return Stacked(one.base, one.pairs, name=one.name, recipe=one.recipe), a, b


def of_stack(a: Tensor, b: Tensor) -> Tensor:
    return plain(R).value * torch.einsum("eor,eri->eoi", b, a)


@narrow
def test_a_stack_packed_otherwise(storage):
    one, a, b = stacked(storage)
    assert healthy(one, one.merged(of_stack(a, b)))
    flat_a, flat_b = one.pairs[0]
    a_wrong = torch.stack([flat_a[e::E] for e in range(E)])
    b_wrong = torch.stack([flat_b[:, e * R : (e + 1) * R] for e in range(E)])
    for cut_a, cut_b, word in ((a_wrong, b, "A taken"), (a, b_wrong, "B taken"), (a_wrong, b_wrong, " and ")):
        assert word in str(told(named(one, one.merged(of_stack(cut_a, cut_b))), "LC148")["cut"])
    few = torch.zeros_like(one.base, dtype=torch.float32)
    for e in range(E // 4):
        few[e] = plain(R).value * flat_b[:, e :: E // 4] @ flat_a[e * 4 * R : (e + 1) * 4 * R]
    assert told(named(one, one.merged(few)), "LC148")["cut"] == f"for {E // 4} experts in place of {E}"


@wide
def test_a_stack_in_another_order(storage):
    one, a, b = stacked(storage)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [1, 2, 3, 4, 5, 6, 7, 0], [0, 1, 2, 3] * 2):
        assert told(named(one, one.merged(of_stack(a[order], b[order]))), "LC147")["orders"]
    gate_up = of_stack(a, b)
    swapped = torch.cat([gate_up[:, 10:], gate_up[:, :10]], 1)
    assert told(named(one, one.merged(swapped)), "LC141")["order"] == "up|gate"
    odd = [3, 1, 0, 2, 4, 5, 7, 6]
    assert named(one, one.merged(of_stack(a[odd], b[odd]))).codes == ("LC199",)


def test_experts_in_tensors_of_their_own_cut_in_another_packing():
    one, a, b = stacked("bfloat16")
    flat_a, flat_b = one.pairs[0]
    parameter = "layers.0.mlp.experts.up_proj"
    settings = {"target_parameters": ["mlp.experts.up_proj"]}
    made = []
    for e in range(E):
        single = target(20, "bfloat16", rank=R, seed=e, name=f"layers.0.mlp.experts.{e}.up_proj.weight")
        made.append(Single(single.base, ((a[e], b[e]),), name=single.name, settings=settings, parameter=parameter))
    for e in (0, 5):
        peers = tuple(peer_of(other) for other in made if other is not made[e])
        alone = replace(made[e], peers=peers)
        assert healthy(alone, alone.merged(delta(alone)))
        a_wrong, b_wrong = flat_a[e::E], flat_b[:, e * R : (e + 1) * R]
        wrong = alone.merged(plain(R).value * b_wrong @ a_wrong)
        assert told(named(alone, wrong), "LC148")["cut"] == "A taken rank by rank and B taken expert by expert"
        assert "LC148" not in named(replace(alone, settings={}), wrong).codes


@dataclass(frozen=True)
class Single(Target):
    """One expert of a raw parameter."""

    settings: Mapping[str, object] = field(default_factory=dict)
    parameter: str = ""

    @property
    def steps(self) -> tuple[LoadedStep, ...]:
        (step,) = super().steps
        assert step.site
        return (replace(step, site=replace(step.site, parameter=self.parameter, settings=self.settings)),)


# ------------------------------------------------------------------------------------------ numbers read otherwise


@both
@pytest.mark.parametrize("chosen", ["A", "B", "AB"])
def test_a_factor_reshaped_in_place_of_transposed(chosen, storage):
    one = target(24, storage)
    a, b = one.pairs[0]
    for read in (lambda x: x.reshape(x.shape[::-1]).T, lambda x: x.T.reshape(x.shape)):
        wrong_a, wrong_b = (read(x) if role in chosen else x for role, x in zip("AB", (a, b), strict=True))
        evidence = told(named(one, one.merged(one.scale.value * wrong_b @ wrong_a)), "LC149")
        assert evidence["factors"] == " and ".join(chosen)
    assert "LC149" not in named(one, one.merged(one.scale.value * b @ a.flip(0))).codes


@both
@pytest.mark.parametrize("chosen", ["A", "B", "AB"])
def test_the_bytes_of_a_factor_in_the_wrong_dtype(chosen, storage):
    plain_ = target(24, storage)
    stored = tuple(x.bfloat16() for x in plain_.pairs[0])
    one = replace(plain_, pairs=(stored,))
    assert healthy(one, one.merged(one.scale.value * stored[1].float() @ stored[0].float()))
    a, b = (
        x.view(torch.float16).float() if role in chosen else x.float() for role, x in zip("AB", stored, strict=True)
    )
    assert told(named(one, one.merged(one.scale.value * b @ a)), "LC150")["factors"] == " and ".join(chosen)
    assert not FAULTS["LC150"].inject(plain_.case)


@pytest.mark.parametrize(("kernel", "storage"), [((3, 3), "bfloat16"), ((3, 2), "float32"), ((5,), "bfloat16")])
def test_a_kernel_in_another_order(kernel, storage):
    rng = torch.Generator().manual_seed(0)
    base = (torch.randn(16, 8, *kernel, generator=rng) * 0.02).to(DTYPES[storage])
    a, b = torch.randn(6, 8, *kernel, generator=rng), torch.randn(16, 6, generator=rng)
    product = plain(6).value * (b @ a.reshape(6, -1)).reshape(base.shape)
    b *= SIZE * base.float().norm() / product.norm()
    product *= SIZE * base.float().norm() / product.norm()
    one = Target(base, ((a, b.reshape(16, 6, *(1 for _ in kernel))),), recipe="lora-conv", name="conv.weight")
    assert healthy(one, one.merged(product))
    laid = product.movedim(1, -1).reshape(base.shape)
    assert told(named(one, one.merged(laid)), "LC153")["order"] == "channels laid last"
    turned = product.flip(tuple(range(2, product.ndim)))
    assert told(named(one, one.merged(turned)), "LC153")["order"] == "turned round"
    if kernel == (3, 3):
        exchanged = named(one, one.merged(product.transpose(-1, -2)))
        assert told(exchanged, "LC153")["order"] == "height and width exchanged"
    assert named(one, one.merged(product.flip(1))).codes == ("LC199",)


# -------------------------------------------------------------------------------------------------- tensor parallel


@pytest.mark.parametrize(("ranks", "storage"), [(2, "bfloat16"), (4, "float32"), (8, "bfloat16")])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_slice_of_the_delta(axis, ranks, storage):
    one = target(24, storage)
    for index in {0, ranks - 1}:
        kept = torch.zeros(24, IN)
        size = kept.shape[axis] // ranks
        own = (slice(None),) * axis + (slice(index * size, (index + 1) * size),)
        kept[own] = delta(one)[own]
        evidence = told(named(one, one.merged(kept)), "LC152")
        noun = ("rows", "columns")[axis]
        assert evidence["slice"] == f"{noun} {index * size}-{(index + 1) * size - 1} of {kept.shape[axis]}"
    third = delta(one).clone()
    third[8:] = 0
    assert named(one, one.merged(third)).codes == ("LC199",)


@wide
def test_a_slice_of_the_rows_of_an_in_out_weight(storage):
    flat = target(24, storage)
    one = replace(flat, base=flat.base.T.contiguous(), recipe="lora-linear-in-out")
    kept = delta(one).T.clone()
    kept[IN // 2 :] = 0
    assert told(named(one, one.merged(kept)), "LC152")["slice"] == f"rows 0-{IN // 2 - 1} of {IN}"


def seen(module: str, code: str | None = None, **evidence: object) -> Comparison:
    return Comparison(
        tensor=f"{module}.weight",
        kind="target",
        recipe="lora-linear",
        module=module,
        adapters=(0,),
        shape=(5, 5),
        dtype="bfloat16",
        verdict=Verdict.REFUTED if code else Verdict.VERIFIED,
        exact=not code,
        signal=1.0,
        overlap=1.0,
        code=code,
        told=evidence,
    )


def layers(families: Sequence[str], code: Callable[[str], Comparison]) -> list[Comparison]:
    return [code(f"model.layers.{n}.x.{name}") for n in range(3) for name in families]


ROWS = ("o_proj", "down_proj")
COLUMNS = ("q_proj", "up_proj")
PLAN = Plan(pairings=())


@pytest.mark.parametrize(("times", "code"), [(2, "LC102"), (4, "LC110"), (8, "LC110"), (4, "LC102")])
def test_row_parallel_targets_with_several_deltas(times, code):
    evidence = {"times": times} if code == "LC102" else {"factor": times, "factor_low": times, "factor_high": times}
    fine, wrong = layers(COLUMNS, seen), layers(ROWS, lambda name: seen(name, code, **evidence))
    (one,) = FAULTS["LC151"].detect(PLAN, [*fine, *wrong])
    assert set(one.tensors) == {c.tensor for c in wrong}
    assert one.evidence == {"times": times, "families": {"o_proj": 3, "down_proj": 3}}
    assert code in FAULTS["LC151"].absorbs
    everything = layers((*COLUMNS, *ROWS), lambda name: seen(name, code, **evidence))
    one_healthy = [*fine, *wrong[1:], seen("model.layers.0.x.o_proj")]
    for others in (everything, one_healthy, fine, wrong):
        assert not FAULTS["LC151"].detect(PLAN, others)


def test_fused_projections_with_a_share_of_the_scale():
    third = {"factor": 0.33331, "factor_low": 0.3330, "factor_high": 0.3340}
    fine = layers(["o_proj", "gate_up_proj"], seen)
    wrong = layers(["qkv_proj"], lambda name: seen(name, "LC110", **third))
    (one,) = FAULTS["LC143"].detect(PLAN, [*fine, *wrong])
    assert one.evidence == {"factor": pytest.approx(1 / 3), "parts": 3}
    assert one.message.startswith("1/3 of the scale in 3 fused projections")
    plain_ = layers(["q_proj"], lambda name: seen(name, "LC110", **third))
    half = layers(["qkv_proj"], lambda name: seen(name, "LC110", factor=0.5))
    for others in (wrong, [*fine, *wrong, *plain_], [*fine, *half], [*fine, *plain_]):
        assert not FAULTS["LC143"].detect(PLAN, others)


# ------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("code", [f"LC{n}" for n in range(140, 155)])
def test_the_codes_of_this_page_have_causes(code):
    assert FAULTS[code].causes
    assert FAULTS[code].severity == "error"


@pytest.mark.parametrize("code", [f"LC{n}" for n in (140, 141, 142, 144, 145, 146, 147, 148, 149, 150, 152, 153)])
def test_a_copied_or_untouched_tensor_has_no_such_mistake(code):
    copied = LoadedStep(recipe=RECIPES["copy"], factors={"S": torch.ones(24, IN)})
    case = replace(target(24, "float32").case, config=GQA, steps=(copied,))
    assert not FAULTS[code].inject(case)
    assert not FAULTS[code].inject(replace(case, steps=()))
