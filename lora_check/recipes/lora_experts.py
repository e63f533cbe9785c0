"""W'[e] = W[e] + s B_e A_e, for each expert e of a stack of matrices.

W   base     (experts, out, in), or (experts, in, out) with the product transposed
A   factor   (experts r, in): the rows of expert e are e r to e r + r
B   factor   (out, r experts): the columns of expert e are e, e + experts, e + 2 experts ...

LoRA on a raw parameter (target_parameters). Up to PEFT 0.18 every such parameter was taken as (experts, in, out); since
0.19 the model says which it is, and a square one can be either. PEFT stores the delta in the parameter's dtype first.
Source: PEFT tuners/lora/layer.py ParamWrapper.get_delta_weight.
"""

from dataclasses import replace

from lora_check.types import Factors, Hand, LoadedStep, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """A (experts, r, x) and B (experts, y, r), so that each product is that of the weight's own rows."""
    from lora_check.functions import moved

    count = site.shape[0]
    a = moved(factors["A"], lambda x: x.reshape(count, -1, x.shape[1]))
    b = moved(factors["B"], lambda x: x.reshape(x.shape[0], -1, count).permute(2, 0, 1))
    return {"left": a.mT, "right": b.mT} if _in_out(site) else {"left": b, "right": a}


def product(factors: Factors, rows: slice) -> Numbers:
    """The rows, counted through all experts."""
    from lora_check.functions import stacked_rows

    left, right = factors["left"], factors["right"]
    height = int(left.shape[1])
    experts = range(rows.start // height, (rows.stop - 1) // height + 1)
    spans = [slice(max(rows.start - e * height, 0), min(rows.stop - e * height, height)) for e in experts]
    return stacked_rows([left[e][span] @ right[e] for e, span in zip(experts, spans, strict=True)])


def _in_out(site: Site) -> bool:
    inputs, outputs = site.roles["A"][1], site.roles["B"][0]
    return bool(site.in_out) if inputs == outputs else site.shape[1:] == (inputs, outputs)


def fits(site: Site) -> bool:
    """A pair of factors as wide as all experts together."""
    a, b, shape = site.roles.get("A", ()), site.roles.get("B", ()), site.shape
    if set(site.roles) != {"A", "B"} or len(a) != 2 or len(b) != 2 or len(shape) != 3:
        return False
    return a[0] == b[1] and a[0] % shape[0] == 0 and shape[1:] in ((b[0], a[1]), (a[1], b[0]))


def turned(step: LoadedStep) -> LoadedStep:
    """The same experts with inputs and outputs exchanged."""
    assert step.site is not None
    return replace(step, site=replace(step.site, in_out=not step.site.in_out))


RECIPE = Recipe(
    name="lora-experts",
    formula="W'[e] = W[e] + s B_e A_e",
    fits=fits,
    prepare=prepare,
    product=product,
    stored=True,
    stacked=True,
    releases={"PEFT 0.17 and 0.18": turned},
)
