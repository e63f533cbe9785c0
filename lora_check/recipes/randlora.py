"""W' = W + s sum over n of B_n diag(lambda_n) A diag(gamma_n), or its transpose where out < in.

W        base    (out, in), or (in, out) in a Conv1D of transformers
lambda   factor  (r, n), stored as `randlora_lambda`
gamma    factor  (n, min(out, in)), stored as `randlora_gamma`
A        basis   (r, 1, least), stored as `base_model.randlora_A`, and once more with each module
B        basis   (most, n, r), stored as `base_model.randlora_B`, and once more with each module
s        scale   randlora_alpha / r

least and most are the smaller and the larger of the largest out and the largest in of all targets; what is beyond the
weight's own is cut off. PEFT lays B out as (n, r) and the product of lambda, A and gamma as (r, n) and multiplies the
two as they lie, merged and unmerged. With save_projection off A and B are drawn again from projection_prng_key: in
bfloat16, or in float16 where the machine has no other, and divided by their standard deviation; or of -1, 0 and 1.
They are rounded to the dtype of the base. Source: Albert et al., "RandLoRA" (2025); PEFT tuners/randlora/layer.py
Linear.get_scaled_bases, get_delta_weight, tuners/randlora/model.py _kaiming_init.
"""

from math import ceil

from lora_check.errors import CorruptCheckpointError
from lora_check.recipes._randlora import METHOD, bases, in_half
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """`left` and `right`, whose product is the unscaled delta as the weight is kept."""
    a, b = _bases(factors, site, hand)
    (rank, count), (least, most) = site.roles["lambda"], sorted(site.shape)
    down = factors["lambda"].reshape(rank, count, 1) * a[:, :, :least] * factors["gamma"].reshape(1, count, least)
    down, up = down.reshape(rank * count, least), b[:most, :count].reshape(most, count * rank)
    inputs = site.shape[0 if site.in_out else 1]
    straight = (least == inputs) != bool(site.in_out)
    return {"left": up, "right": down} if straight else {"left": down.T, "right": up.T}


def _bases(factors: Factors, site: Site, hand: Hand) -> tuple[Numbers, Numbers]:
    """A and B.

    raises   CorruptCheckpointError: a module has other ones than its adapter
    """
    from lora_check.functions import like, middle

    if not site.settings["saved"]:
        largest, drawn = site.settings["largest"], site.settings["drawn"]
        found = bases(site.settings["seed"], site.roles["lambda"][0], largest, drawn)
        a, b = (hand.settle(like(factors["gamma"], one)) for one in found)
        return a, b
    for role in ("A", "B"):
        copy = factors.get(f"copy_{role}")
        if copy is not None and not middle(factors[f"basis_{role}"]).equal(middle(copy)):
            raise CorruptCheckpointError(
                f"the randlora_{role} stored with {site.parameter} is not the adapter's own base_model.randlora_{role}",
                hint="save the adapter again with save_pretrained",
            )
    return factors["basis_A"], factors["basis_B"]


def product(factors: Factors, rows: slice) -> Numbers:
    """(left right)[rows]."""
    return factors["left"][rows] @ factors["right"]


def fits(site: Site) -> bool:
    """lambda and gamma for as many bases as give full rank, with bases at least as large, or a seed for them."""
    roles = site.roles
    if site.leaf != "weight" or len(site.shape) != 2 or len(roles.get("lambda", ())) != 2:
        return False
    (rank, count), (least, most) = roles["lambda"], sorted(site.shape)
    if rank != site.settings["rank"] or roles.get("gamma") != (count, least) or count != ceil(least / rank):
        return False
    if not site.settings["saved"]:
        return set(roles) == {"lambda", "gamma"}
    if set(roles) - {"copy_A", "copy_B"} != {"lambda", "gamma", "basis_A", "basis_B"}:
        return False
    a, b = roles["basis_A"], roles["basis_B"]
    alike = roles.get("copy_A", a) == a and roles.get("copy_B", b) == b
    ranked = len(a) == len(b) == 3 and (*a[:2], b[2]) == (rank, 1, rank)
    return alike and ranked and a[2] >= least and b[0] >= most and b[1] >= count


RECIPE = Recipe(
    name="randlora",
    formula="W' = W + s sum B diag(lambda) A diag(gamma)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    anywhere={"a machine without bfloat16": in_half},
)
