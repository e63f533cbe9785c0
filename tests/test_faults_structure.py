"""The fault folder: its shape, its pages, and each fault on inputs written by hand, with the healthy one beside it."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch

from lora_check import registry
from lora_check.replay import bits as stored_bits
from lora_check.replay import expected, interval, replay, written
from lora_check.rounding import ADD, LOST_SNR_DB, LOST_SURVIVAL
from lora_check.types import (
    Adapter,
    AdapterConfig,
    Case,
    Comparison,
    LoadedStep,
    Mismatch,
    Pairing,
    Part,
    PatternFault,
    Plan,
    PlanFault,
    Scale,
    Step,
    TensorMeta,
    ValueFault,
    Verdict,
)

FOLDER = Path(registry.__file__).parent / "faults"
FAULTS = registry.load("faults")
RECIPES = registry.load("recipes")
HEADINGS = ("What it is", "How it happens", "How it is told", "Evidence", "What to do", "Seen in")
VALUE = [f"LC{n:03}" for n in (101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 120, 130, 199, 403)]
PLAN = [f"LC{n:03}" for n in (1, 2, 3, 5, 6, 201, 202, 203, 204, 205, 207, 301, 303, 305)]
FILES = ("LC007", "LC012", "LC213", "LC214", "LC315", "LC316", "LC317")
PATTERN = [f"LC{n:03}" for n in (4, 302, 306, 401, 404, 501, 502)]

# ------------------------------------------------------------------------------------------------- the folder


def test_every_fault_is_there_and_of_its_kind():
    kinds = {ValueFault: VALUE, PlanFault: PLAN, PatternFault: PATTERN}
    for kind, codes in kinds.items():
        assert set(codes) <= {code for code, fault in FAULTS.items() if isinstance(fault, kind)}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("lc*.py")), ids=lambda path: path.stem)
def test_file_name_is_code_and_name_and_the_docstring_is_the_page(path):
    code, _, name = path.stem.partition("_")
    fault = FAULTS[code.upper()]
    assert (fault.code, fault.name) == (code.upper(), name.replace("_", "-"))
    lines = registry.page("faults", fault.code).splitlines()
    assert lines[0] == f"{fault.code} {fault.name}"
    assert tuple(line for line in lines if line in HEADINGS) == HEADINGS
    assert all(lines[lines.index(heading) - 1] == "" and lines[lines.index(heading) + 1] for heading in HEADINGS)
    assert 12 <= len(lines) <= 32
    threads = " ".join(lines[lines.index("Seen in") + 1 :])
    assert threads == "No public report known." or all(
        one.count("/") == 1 and one.split("#")[1].isdigit() for one in threads.split(", ")
    )


@pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda fault: fault.code)
def test_words_of_a_fault(fault):
    assert fault.severity in ("error", "warning", "info")
    assert fault.summary
    assert not fault.summary.endswith(".")
    assert "\n" not in fault.summary
    assert fault.help[0].islower()
    assert not fault.help.endswith(".")
    milder = {
        "warning": (
            "LC005",
            "LC006",
            "LC209",
            "LC306",
            "LC307",
            "LC308",
            "LC310",
            "LC008",
            "LC011",
            "LC014",
            "LC015",
            "LC016",
            "LC212",
            "LC169",
            "LC161",
            "LC312",
            "LC313",
            "LC221",
        ),
        "info": (
            "LC001",
            "LC204",
            "LC208",
            "LC301",
            "LC302",
            "LC303",
            "LC305",
            "LC309",
            "LC311",
            "LC220",
            "LC223",
            *FILES,
            "LC406",
            "LC407",
        ),
    }
    assert fault.severity == next((word for word, codes in milder.items() if fault.code in codes), "error")


def test_absorbed_codes_exist():
    assert all(code in FAULTS for fault in FAULTS.values() if isinstance(fault, PatternFault) for code in fault.absorbs)


def test_faults_do_not_import_torch():
    script = (
        "import sys; from lora_check import registry; registry.load('faults');"
        "print([name for name in ('torch', 'numpy', 'peft', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ value faults

OUT, IN, R = 5, 5, 3


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, A, B = numbers(OUT, IN), numbers(R, IN, seed=1), numbers(OUT, R, seed=2)
M = numbers(OUT, seed=3).abs() + 1
S = numbers(OUT, IN, seed=4)
SCALE = Scale(alpha=7.0, rank=R, default_alpha=7.0, default_rank=R)


def case_of(recipe="lora-linear", factors=None, scale=SCALE, base=W, storage="float64"):
    step = LoadedStep(recipe=RECIPES[recipe], factors={"A": A, "B": B} if factors is None else factors, scale=scale)
    return Case(base=base, steps=(step,), storage=storage)


PLAIN = case_of()
DORA = case_of("dora-linear", {"A": A, "B": B, "m": M})
COPY = case_of("copy", {"S": S}, scale=None)
BYSTANDER = Case(base=W, steps=(), storage="float64")
BOTH = replace(PLAIN, steps=(*COPY.steps, *PLAIN.steps))


def merged(case):
    return expected(case).rows(slice(0, case.rows)).total


def injected(code, case):
    return FAULTS[code].inject(case)


def only(code, case):
    (changed,) = injected(code, case)
    return merged(changed)


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    return True


def with_scale(**changes):
    return case_of(scale=replace(SCALE, **changes))


def test_adapter_not_applied():
    for case, start in ((PLAIN, W), (BOTH, S)):
        untouched, unmerged = injected("LC101", case)
        assert close(merged(untouched), start)
        assert close(merged(unmerged), start)
        assert (len(untouched.steps), len(unmerged.steps)) == (len(case.steps) - 1, len(case.steps) + 1)
    assert close(only("LC101", DORA), W)
    assert close(only("LC101", replace(PLAIN, storage="bfloat16")), W)
    assert injected("LC101", COPY) == injected("LC101", BYSTANDER) == ()


def test_applied_twice():
    for case, start in ((PLAIN, W), (BOTH, S)):
        changed = injected("LC102", case)
        assert [one.told["times"] for one in changed] == [2, 2, 3, 3, 4]
        assert all(close(merged(one), start + one.told["times"] * 7 / 3 * B @ A) for one in changed)
    once = merged(DORA) + 7 / 3 * B @ A
    assert close(merged(injected("LC102", DORA)[0]), M[:, None] * once / once.norm(dim=1, keepdim=True))
    assert injected("LC102", COPY) == ()


def test_applied_twice_goes_round_by_round():
    two = replace(PLAIN, steps=(PLAIN.steps[0], DORA.steps[0]))
    assert injected("LC102", two)[0].steps == two.steps * 2


def test_subtracted():
    assert close(only("LC103", PLAIN), W - 7 / 3 * B @ A)
    assert injected("LC103", with_scale(alpha=0.0)) == injected("LC103", COPY) == ()


def test_transposed_delta():
    assert close(only("LC104", PLAIN), W + 7 / 3 * (B @ A).T)
    assert close(only("LC104", case_of("lora-linear-in-out")), W + 7 / 3 * B @ A)
    moved = W + 7 / 3 * (B @ A).T
    assert close(only("LC104", DORA), M[:, None] * moved / moved.norm(dim=1, keepdim=True))
    oblong = case_of(factors={"A": numbers(R, 4), "B": B}, base=numbers(OUT, 4))
    column = case_of("lora-bias", {"bias": numbers(1)}, base=numbers(1, 1))
    convolution = case_of("lora-conv", {"A": A[..., None], "B": B[..., None]})
    assert injected("LC104", oblong) == injected("LC104", column) == injected("LC104", convolution) == ()
    assert injected("LC104", COPY) == ()


def test_delta_only():
    assert close(only("LC105", PLAIN), 7 / 3 * B @ A)
    assert close(only("LC105", BOTH), 7 / 3 * B @ A)
    assert injected("LC105", DORA) == injected("LC105", COPY) == ()


@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16", "float16"])
def test_delta_only_is_replayed_in_every_dtype_without_holding_a_base(storage):
    base = W.to(getattr(torch, storage))
    (changed,) = injected("LC105", case_of(base=base, storage=storage))
    assert changed.base.untyped_storage().nbytes() == base.element_size()
    span = slice(1, 4)
    wanted = (7 / 3 * (B.float()[span] @ A.float())).to(base.dtype)
    seen = stored_bits(written(changed, ADD).rows(span).total, changed, ADD)
    assert seen.dtype == base.dtype
    torch.testing.assert_close(seen, wanted)


def test_magnitude_ignored():
    assert close(only("LC106", DORA), W + 7 / 3 * B @ A)
    columns = case_of("dora-linear-in-out", {"A": A, "B": B, "m": M})
    assert close(only("LC106", columns), W + 7 / 3 * (B @ A).T)
    assert injected("LC106", PLAIN) == injected("LC106", COPY) == ()


def test_rslora_ignored_and_applied():
    stable = with_scale(rule="alpha/sqrt(r)")
    assert close(only("LC107", stable), W + 7 / 3 * B @ A)
    assert close(only("LC112", PLAIN), W + 7 / math.sqrt(3) * B @ A)
    assert injected("LC107", PLAIN) == injected("LC112", stable) == ()
    flat = {"A": A[:1], "B": B[:, :1]}
    assert injected("LC107", case_of(factors=flat, scale=replace(stable.steps[0].scale, rank=1))) == ()
    assert injected("LC112", case_of(factors=flat, scale=replace(SCALE, rank=1))) == ()


def test_alpha_not_divided():
    assert close(only("LC108", PLAIN), W + 7 * B @ A)
    assert close(only("LC108", with_scale(rule="alpha/sqrt(r)", weight=0.5)), W + 0.5 * 7 * B @ A)
    assert injected("LC108", with_scale(rank=1)) == ()


def test_pattern_ignored():
    delta = B @ A
    variants = [merged(one) for one in injected("LC109", with_scale(default_alpha=20.0, default_rank=4))]
    wanted = [W + 20 / 4 * delta, W + 20 / 3 * delta, W + 7 / 4 * delta]
    assert len(variants) == 3
    assert all(map(close, variants, wanted))
    (alpha_only,) = injected("LC109", with_scale(default_alpha=20.0))
    assert close(merged(alpha_only), W + 20 / 3 * delta)
    (rank_only,) = injected("LC109", with_scale(default_rank=4))
    assert close(merged(rank_only), W + 7 / 4 * delta)
    same = injected("LC109", with_scale(default_alpha=14.0, default_rank=6))  # 14 / 6 is the honest 7 / 3
    assert [one.steps[0].s for one in same] == [14 / 3, 7 / 6]
    assert injected("LC109", PLAIN) == ()


def test_wrong_scale_is_fitted():
    assert injected("LC110", PLAIN) == ()
    assert close(merged(FAULTS["LC110"].fit(PLAIN, 0.4)), W + 0.4 * 7 / 3 * B @ A)
    assert close(merged(FAULTS["LC110"].fit(with_scale(weight=0.5), 0.4)), W + 0.2 * 7 / 3 * B @ A)
    assert FAULTS["LC110"].fit(COPY, 0.4) == COPY


def test_scale_one():
    assert close(only("LC111", PLAIN), W + B @ A)
    assert close(only("LC111", with_scale(rule="alpha/sqrt(r)", weight=0.3)), W + B @ A)
    assert injected("LC111", with_scale(alpha=3.0)) == ()


@pytest.mark.parametrize(
    ("storage", "formats"),
    [
        ("float64", ["bfloat16", "float16"]),
        ("float32", ["bfloat16", "float16"]),
        ("float16", ["bfloat16"]),
        ("bfloat16", []),
    ],
)
@pytest.mark.parametrize("kind", ["target", "copy", "bystander"])
def test_through_narrower_dtype(storage, formats, kind):
    assert kind in FAULTS["LC120"].kinds
    base = W.to(getattr(torch, storage))
    case = replace({"target": PLAIN, "copy": COPY, "bystander": BYSTANDER}[kind], base=base, storage=storage)
    changed = injected("LC120", case)
    # an untouched tensor cannot tell a narrow model from a conversion; a merged one can, and is asked for both
    held = formats if kind == "target" or kind == "copy" else []
    assert [(one.through, one.held) for one in changed] == [(f, None) for f in formats] + [(None, f) for f in held]
    for one in changed:
        assert replace(one, through=None, held=None) == case
        rows = stored_bits(written(one, ADD).rows(slice(0, OUT)).total, one, ADD)
        narrow = getattr(torch, one.through or one.held)
        assert rows.dtype == base.dtype
        assert torch.equal(rows, rows.to(narrow).to(rows.dtype))


def test_through_a_dtype_that_the_base_has_already():
    case = Case(base=W.to(torch.bfloat16), steps=(), storage="float32")
    assert [one.through for one in injected("LC120", case)] == ["float16"]


def test_saved_module_not_replaced():
    assert FAULTS["LC403"].kinds == ("target", "copy")
    assert close(only("LC403", COPY), W)
    rows = case_of("token-rows", {"rows": S[:2]}, scale=None)
    assert close(only("LC403", replace(rows, steps=(replace(rows.steps[0], tokens=(1, 3)),))), W)
    assert injected("LC403", BYSTANDER) == injected("LC403", PLAIN) == ()


def test_assigned_by_the_engine():
    assert injected("LC130", PLAIN) == injected("LC199", PLAIN) == ()


@pytest.mark.parametrize("code", VALUE)
@pytest.mark.parametrize(
    "case", [PLAIN, DORA, COPY, BYSTANDER, BOTH], ids=["plain", "dora", "copy", "bystander", "both"]
)
def test_a_fault_leaves_the_case_itself_alone(code, case):
    before = (case.base.clone(), {role: factor.clone() for step in case.steps for role, factor in step.factors.items()})
    for changed in injected(code, case):
        assert changed.storage == case.storage
        assert not torch.equal(merged(changed), merged(case)) or changed.through or changed.held
    assert torch.equal(before[0], case.base)
    assert all(torch.equal(before[1][role], f) for step in case.steps for role, f in step.factors.items())


def test_changed_cases_have_intervals_too():
    from lora_check.number_kinds import Bounds

    for code in ("LC101", "LC102", "LC105", "LC111"):
        for changed in injected(code, replace(PLAIN, base=W.to(torch.bfloat16), storage="bfloat16")):
            low, high = interval(replay(changed, Bounds(changed, ADD)).rows(slice(0, OUT)).total, changed, ADD)
            assert bool((low <= high).all())


# ------------------------------------------------------------------------------------------------- plan faults


@dataclass
class Held:
    """A checkpoint of names only."""

    names: dict = field(default_factory=dict)
    location: str = "adapter"
    config: dict = field(default_factory=dict)

    def metas(self):
        return {name: TensorMeta(name=name, shape=shape, dtype="float32") for name, shape in self.names.items()}

    def read(self, name):
        raise AssertionError("a plan fault reads no tensor")

    def close(self):
        pass


Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}.lora_A.weight"
TARGET = (Step(recipe=RECIPES["lora-linear"], adapter=0, factors={"A": "a", "B": "b"}, scale=SCALE),)


def adapter_of(shape=(3, 5), base_name="", unsupported=(), **rest):
    return Adapter(
        config=AdapterConfig(method="LORA", rank=3, alpha=7.0, base_name=base_name, unsupported=unsupported),
        checkpoint=Held({KEY: shape}),
        dialect="peft",
        **{"parts": (Part(tensor=KEY, module=Q, role="A"),), **rest},
    )


def pairing_of(name=f"{Q}.weight", dtype="bfloat16", base_dtype="bfloat16", steps=TARGET, undecidable=""):
    return Pairing(
        merged=TensorMeta(name=name, shape=(5, 5), dtype=dtype),
        base=TensorMeta(name=name, shape=(5, 5), dtype=base_dtype),
        steps=steps,
        module=name.removesuffix(".weight"),
        undecidable=undecidable,
    )


NORM = pairing_of("model.norm.weight", steps=())
HEALTHY = Plan(pairings=(pairing_of(), NORM), adapters=(adapter_of(),), base_location="/models/llama")


def detect(code, plan, comparisons=None):
    fault = FAULTS[code]
    found = fault.detect(plan) if comparisons is None else fault.detect(plan, comparisons)
    for one in found:
        assert (one.code, one.name, one.severity, one.help) == (code, fault.name, fault.severity, fault.help)
        assert len(set(one.tensors)) == len(one.tensors)
        assert "\n" not in one.message
        assert not one.message.endswith(".")
    return found


@pytest.mark.parametrize("code", PLAN)
def test_a_healthy_plan_gives_nothing(code):
    assert not detect(code, HEALTHY)


def test_verdict_that_a_plan_fault_allows():
    allowed = {code: FAULTS[code].verdict.value for code in PLAN}
    assert {code for code, word in allowed.items() if word == "refuted"} == {"LC201", "LC202", "LC203", "LC207"}
    assert {code for code, word in allowed.items() if word == "inconclusive"} == {
        "LC002",
        "LC003",
        "LC205",
        "LC301",
        "LC303",
        "LC305",
    }


@pytest.mark.parametrize(
    ("recorded", "location", "name_or_path", "told"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "/models/x", "meta-llama/Llama-2-7b-hf", True),
        ("meta-llama/Llama-2-7b", "/c/hub/models--meta-llama--Llama-2-13b/snapshots/0123", None, True),
        ("gpt2", "/c/hub/models--distilgpt2/snapshots/0123", None, True),
        ("meta-llama/Llama-2-7b", "/c/hub/models--meta-llama--Llama-2-7b/snapshots/0123", None, False),
        ("meta-llama/Llama-2-7b", "/models/llama-2-7B/", "somebody/else", False),
        ("meta-llama/Llama-2-7b", "/models/base", "mirror/llama-2-7b", False),
        ("meta-llama/Llama-2-7b", "/models/base", None, False),
        ("meta-llama/Llama-2-7b", "", "/home/me/stage1", False),
        ("/home/me/stage1", "/models/base", "meta-llama/Llama-2-7b", False),
        ("./stage1", "/models/base", "meta-llama/Llama-2-7b", False),
        ("out/run/stage1", "/models/base", "meta-llama/Llama-2-7b", False),
        ("C:\\models\\x", "/models/base", "meta-llama/Llama-2-7b", False),
        ("", "/models/base", "meta-llama/Llama-2-7b", False),
    ],
)
def test_base_differs_from_record(recorded, location, name_or_path, told):
    config = {} if name_or_path is None else {"_name_or_path": name_or_path}
    found = detect(
        "LC001",
        replace(HEALTHY, adapters=(adapter_of(base_name=recorded),), base_location=location, base_config=config),
    )
    assert bool(found) == told
    assert all(one.evidence["recorded"] == recorded and recorded in one.message for one in found)


def test_config_contradicts_tensors():
    (one,) = detect("LC002", replace(HEALTHY, contradictions=("q_proj: r = 8, 4 rows",)))
    assert one.message == "q_proj: r = 8, 4 rows"
    (one,) = detect("LC002", replace(HEALTHY, contradictions=("x", "y")))
    assert one.message == "x, and 1 more contradiction"
    (one,) = detect("LC002", replace(HEALTHY, contradictions=("x", "y", "z")))
    assert one.message == "x, and 2 more contradictions"
    assert one.evidence["contradictions"] == ["x", "y", "z"]


def test_empty_adapter():
    assert len(detect("LC003", replace(HEALTHY, adapters=(adapter_of(), adapter_of(parts=()))))) == 1
    assert len(detect("LC003", replace(HEALTHY, adapters=(adapter_of(shape=(0,)),)))) == 1


def test_foreign_key_prefix():
    (one,) = detect("LC005", replace(HEALTHY, adapters=(adapter_of(foreign_prefix="_orig_mod."),)))
    assert "_orig_mod." in one.message
    assert one.severity == "warning"


def test_target_without_factors():
    (one,) = detect("LC006", replace(HEALTHY, idle=("a.k_proj", "b.k_proj", "c.k_proj")))
    assert one.message.startswith("3 targets ")
    assert one.tensors == ("a.k_proj", "b.k_proj", "c.k_proj")


def test_missing_and_extra_tensor():
    plan = replace(HEALTHY, missing=("score.weight",), extra=("lm_head.weight", "x"))
    (missing,), (extra,) = detect("LC201", plan), detect("LC202", plan)
    assert missing.tensors == ("score.weight",)
    assert missing.message.startswith("1 tensor missing")
    assert extra.tensors == ("lm_head.weight", "x")
    assert extra.message.startswith("2 tensors of MERGED")
    assert not detect("LC207", plan)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_unmerged_state_dict_takes_over_what_it_explains(prefix):
    inner = [f"{Q}.base_layer.weight", f"{Q}.lora_A.default.weight", f"{Q}.lora_B.default.weight"]
    inner += ["embed.lora_embedding_A.default", "score.original_module.weight", "score.modules_to_save.default.weight"]
    extra = tuple(prefix + name for name in inner) + (("base_model.model.norm.weight",) if prefix else ())
    missing = (f"{Q}.weight", "score.weight") + (("norm.weight",) if prefix else ())
    plan = replace(HEALTHY, missing=missing, extra=extra)
    (one,) = detect("LC207", plan)
    assert one.tensors == extra
    assert not detect("LC201", plan)
    assert not detect("LC202", plan)
    more = replace(plan, missing=(*missing, "lost.weight"), extra=(*extra, "new.weight"))
    assert detect("LC201", more)[0].tensors == ("lost.weight",)
    assert detect("LC202", more)[0].tensors == ("new.weight",)


def test_shape_and_dtype_changed():
    shapes = [Mismatch(name=name, expected="(5, 4)", actual="(6, 4)") for name in ("a", "b")]
    (one,) = detect("LC203", replace(HEALTHY, reshaped=tuple(shapes)))
    assert one.message == "2 tensors of another shape: a is (6, 4), not (5, 4)"
    assert one.evidence["shapes"] == {"(5, 4) -> (6, 4)": 2}
    types = [("a", "bfloat16", "float32"), ("b", "float16", "float32"), ("c", "bfloat16", "float32")]
    retyped = tuple(Mismatch(name=name, expected=old, actual=new) for name, old, new in types)
    first, second = detect("LC204", replace(HEALTHY, retyped=retyped))
    assert first.message == "2 tensors stored as float32, bfloat16 in BASE"
    assert first.tensors == ("a", "c")
    assert second.tensors == ("b",)


def test_unused_adapter_tensor_names_the_closest():
    orphans = [(0, f"base_model.model.language_model.{Q.removeprefix('model.')}.lora_A.weight")]
    orphans += [(0, orphans[0][1].replace("layers.0", f"layers.{n}")) for n in (1, 2)]
    (one,) = detect("LC205", replace(HEALTHY, orphans=tuple(orphans)))
    assert one.message.startswith("3 adapter tensors that name nothing in BASE")
    assert one.evidence["closest"] == {orphans[0][1]: f"{Q}.weight"}
    (one,) = detect("LC205", replace(HEALTHY, orphans=((0, "zzz"),)))
    assert one.message.startswith("1 adapter tensor that names")
    assert one.evidence["closest"] == {}


def test_no_recipe_groups_by_reason():
    doubts = [pairing_of("a.weight", undecidable="x"), pairing_of("b.weight", undecidable="y")]
    doubts.append(pairing_of("c.weight", undecidable="x"))
    plan = replace(HEALTHY, pairings=tuple(doubts), adapters=(adapter_of(unsupported=("x", "a router")),))
    found = detect("LC301", plan)
    assert [(one.message, one.tensors) for one in found] == [
        ("2 tensors not decided: x", ("a.weight", "c.weight")),
        ("1 tensor not decided: y", ("b.weight",)),
        ("not decided: a router", ()),
    ]
    assert len(detect("LC301", replace(plan, contradictions=("b: y",)))) == 2


@pytest.mark.parametrize(("dtype", "base_dtype"), [("uint8", "bfloat16"), ("bfloat16", "float8_e4m3fn")])
def test_quantised_storage(dtype, base_dtype):
    strange = dtype if dtype != "bfloat16" else base_dtype
    target = pairing_of(dtype=dtype, base_dtype=base_dtype, undecidable="rounding is not modelled")
    plan = replace(HEALTHY, pairings=(target, NORM))
    (one,) = detect("LC303", plan)
    assert one.tensors == (target.merged.name,)
    assert strange in one.message
    assert one.evidence["dtypes"] == {strange: 1}
    assert not detect("LC301", plan)
    bystander = pairing_of("ids", dtype="int64", base_dtype="int64", steps=())
    assert not detect("LC303", replace(HEALTHY, pairings=(bystander,)))


def test_tensors_not_checked():
    (one,) = detect("LC305", replace(HEALTHY, skipped=("a", "b")))
    assert one.message.startswith("2 tensors not checked")
    assert one.tensors == ("a", "b")


# ---------------------------------------------------------------------------------------------- pattern faults


def seen(tensor, kind="target", code=None, **rest):
    verdict = Verdict.REFUTED if code else Verdict.VERIFIED
    numbers = {"signal": 1.0, "overlap": 1.0, "noise": 0.01} if kind == "target" else {}
    given = {
        "recipe": "lora-linear" if kind == "target" else "identity",
        "module": tensor.removesuffix(".weight"),
        "adapters": (0,),
        "shape": (5, 5),
        "dtype": "bfloat16",
        "verdict": verdict,
        "exact": not code,
        **numbers,
        **rest,
    }
    assert given.keys() <= {one.name for one in fields(Comparison)}
    return Comparison(tensor=tensor, kind=kind, code=code, **given)


def model(layers=range(4), families=("q_proj", "k_proj"), stack="model.layers", left=lambda layer, family: False):
    return [
        seen(f"{stack}.{layer}.self_attn.{family}.weight", code="LC101" if left(layer, family) else None)
        for layer in layers
        for family in families
    ]


FINE = [*model(), seen("model.norm.weight", "bystander"), seen("lm_head.weight", "copy")]


@pytest.mark.parametrize("code", PATTERN)
def test_a_healthy_model_gives_nothing(code):
    assert not detect(code, HEALTHY, FINE)
    assert not detect(code, HEALTHY, [])


def test_zero_adapter():
    zero = [replace(one, signal=0.0, overlap=0.0, noise=0.0) for one in model()]
    (one,) = detect("LC004", HEALTHY, [*zero, seen("n", "bystander")])
    assert len(one.tensors) == 8
    assert one.evidence["targets"] == 8
    assert not detect("LC004", HEALTHY, [*zero[1:], FINE[0]])
    doubtful = replace(HEALTHY, pairings=(pairing_of("a.weight", undecidable="x"),))
    assert not detect("LC004", doubtful, [seen("a.weight", signal=0.0, verdict=Verdict.INCONCLUSIVE)])


def test_delta_below_storage_resolution():
    noise = 10 ** (-LOST_SNR_DB / 10) * 1.5
    lost = [seen("a", signal=1.0, overlap=0.5, noise=noise), seen("b", signal=3.0, overlap=0.7, noise=3 * noise)]
    gone = seen("c", signal=1.0, overlap=0.0, noise=1.0, vanished=True)
    refuted = [seen("d", code="LC101", noise=9.0), seen("e", code="LC101", vanished=True)]
    first, second = detect("LC302", HEALTHY, [*lost, gone, *refuted, FINE[0]])
    assert first.tensors == ("c",)
    assert "1 of 6 targets" in first.message
    assert second.tensors == ("a", "b")
    assert "more of the fine-tune than it left in 2 of 6 targets" in second.message
    assert second.evidence["survival"] == pytest.approx(1.2 / 4)
    assert second.evidence["snr_db"] == pytest.approx(-10 * math.log10(1.5))
    little = [
        seen("a", signal=1.0, overlap=LOST_SURVIVAL * 0.99, noise=0.3),
        seen("b", signal=1.0, overlap=0.51, noise=0.3),
    ]
    (third,) = detect("LC302", HEALTHY, little)
    assert third.tensors == ("a",)


def test_odd_arithmetic():
    usual = [seen(f"t{n}", exact=True, arithmetic=("fp32-add", "rounded-delta")[n % 2]) for n in range(4)]
    assert not detect("LC306", HEALTHY, usual)
    odd = seen("odd", exact=False, arithmetic="tf32")
    (one,) = detect("LC306", HEALTHY, [*usual, odd, seen("n", "bystander", arithmetic="held-in-fp16")])
    assert one.tensors == ("odd",)
    assert one.message.startswith("1 target ")
    assert one.evidence["odd"] == 1
    assert all(word in str(one.evidence) for word in ("tf32", "fp32-add", "rounded-delta"))
    # the bits themselves, or an order that wrote others' bits, are no oddity; neither is anything where none is exact
    assert not detect("LC306", HEALTHY, [*usual, replace(odd, exact=True)])
    assert not detect("LC306", HEALTHY, [*usual, replace(odd, arithmetic="rounded-delta")])
    assert not detect("LC306", HEALTHY, [replace(one, exact=False) for one in [*usual, odd]])
    # what another dtype was written in says nothing
    assert not detect("LC306", HEALTHY, [*usual, replace(odd, dtype="float32")])
    exact = seen("wide", dtype="float32", exact=True, arithmetic="fp64")
    first, second = detect("LC306", HEALTHY, [*usual, odd, exact, replace(odd, tensor="other", dtype="float32")])
    assert (first.tensors, second.tensors) == (("odd",), ("other",))
    assert FAULTS["LC306"].verdict is Verdict.INCONCLUSIVE


def bystanders(changed, fine, code=None):
    bad = [seen(f"bad{n}", "bystander", code=code, verdict=Verdict.REFUTED, over_budget=n + 1) for n in range(changed)]
    return bad + [seen(f"good{n}", "bystander") for n in range(fine)]


def test_bystander_changed():
    (one,) = detect("LC401", HEALTHY, bystanders(2, 3))
    assert one.tensors == ("bad0", "bad1")
    assert one.message.startswith("2 of 5 bystanders changed")
    assert one.evidence == {"changed": 2, "over_budget": 2}
    assert not detect("LC401", HEALTHY, bystanders(2, 3, code="LC120"))


def test_wrong_base():
    assert FAULTS["LC404"].absorbs == ("LC401", "LC199")
    targets = [seen("t0", code="LC199"), seen("t1", code="LC102")]
    assert not detect("LC404", HEALTHY, [*bystanders(3, 3), *targets])
    assert not detect("LC404", HEALTHY, [*bystanders(6, 1, code="LC120"), *targets])
    (one,) = detect("LC404", HEALTHY, [*bystanders(4, 3), *targets])
    assert one.tensors == ("bad0", "bad1", "bad2", "bad3", "t0")
    assert {"changed": 4, "bystanders": 7, "targets": 1}.items() <= one.evidence.items()


def test_family_left_out():
    half = model(left=lambda layer, family: family == "k_proj")
    (one,) = detect("LC501", HEALTHY, half)
    assert one.message == "all 4 k_proj left at the base"
    assert all("k_proj" in name for name in one.tensors)
    assert len(one.tensors) == 4
    assert not detect("LC502", HEALTHY, half)
    assert not detect("LC501", HEALTHY, model(left=lambda layer, family: True))
    assert not detect("LC501", HEALTHY, model(left=lambda layer, family: family == "k_proj" and layer))


def test_a_family_that_cannot_show_the_delta_has_no_say():
    half = model(left=lambda layer, family: family == "k_proj")
    mute = [one if one.code else replace(one, vanished=True) for one in half]
    assert not detect("LC501", HEALTHY, mute)
    mute = [one if one.code else replace(one, signal=0.0, verdict=Verdict.INCONCLUSIVE) for one in half]
    assert not detect("LC501", HEALTHY, mute)


def test_layers_left_out():
    some = model(range(24), left=lambda layer, family: layer in (0, 3, *range(12, 24)))
    (one,) = detect("LC502", HEALTHY, some)
    assert one.message == "layers 0, 3 and 12-23 (28 of 48 targets) left at the base"
    assert one.evidence["layers"] == {"model.layers": "0, 3, 12-23"}
    assert set(one.tensors) == {c.tensor for c in some if c.code}
    assert not detect("LC501", HEALTHY, some)
    assert not detect("LC502", HEALTHY, model(left=lambda layer, family: True))
    assert not detect("LC502", HEALTHY, model(left=lambda layer, family: (layer + (family == "q_proj")) % 2))


def test_layers_left_out_beside_a_family_left_out():
    both = model(left=lambda layer, family: family == "k_proj" or layer == 2)
    (family,), (layers,) = detect("LC501", HEALTHY, both), detect("LC502", HEALTHY, both)
    assert family.evidence["families"] == {"k_proj": 4}
    assert layers.tensors == ("model.layers.2.self_attn.q_proj.weight",)
    assert layers.message == "q_proj of layer 2 (1 of 8 targets) left at the base"


def test_layers_of_two_stacks_are_told_apart():
    tower = model(range(3), stack="visual.blocks", left=lambda layer, family: layer == 1)
    head = seen("lm_head.weight", code="LC101")
    (one,) = detect("LC502", HEALTHY, [*tower, *model(), head])
    assert one.message == "layer 1 of visual.blocks (2 of 15 targets) left at the base"
    assert detect("LC501", HEALTHY, [*tower, *model(), head])[0].tensors == ("lm_head.weight",)


def test_patterns_absorb_what_they_explain():
    assert FAULTS["LC501"].absorbs == FAULTS["LC502"].absorbs == ("LC101",)
    allowed = {code: FAULTS[code].verdict.value for code in PATTERN}
    assert [code for code, word in allowed.items() if word == "refuted"] == ["LC401", "LC404", "LC501", "LC502"]
    assert (allowed["LC004"], allowed["LC302"]) == ("inconclusive", "verified")
