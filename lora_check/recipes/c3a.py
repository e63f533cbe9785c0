"""W' = W + C / in, C in circulant blocks.

W   base     (out, in)
c   factor   (out / b, in / b, b), stored as `c3a_kernel`: the first row of each block
C   matrix   C[m b + s, n b + t] = c[m, n, (t - s) mod b]

PEFT makes C by Fourier transforms in fp32, stores it in the weight's dtype and divides it there. Here the numbers of c
are put in their places, so that a merge is not reproduced bit for bit: the errors of the transforms are in its budget.
Source: Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution" (2024), section 3; PEFT
tuners/c3a/layer.py C3ALayer.get_delta_weight, tuners/c3a/utils.py get_circulant_fast.
"""

from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site

METHOD = Method(
    name="C3A",
    roles={"c3a_kernel": "c"},
    keys=frozenset({"bias", "block_size", "block_size_pattern"}),
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The numbers of the delta: c / in, stored before and after the division."""
    from lora_check.functions import like, through_spectra

    kernel = through_spectra(factors["c"])
    return {"numbers": hand.settle(hand.settle(kernel) / like(kernel, float(site.shape[1])))}


def product(factors: Factors, rows: slice) -> Numbers:
    """(C / in)[rows]."""
    import torch

    from lora_check.functions import moved

    size = int(factors["numbers"].shape[-1])
    row = torch.arange(rows.start, rows.stop)
    turn = (torch.arange(size) - row[:, None]) % size

    def placed(x: torch.Tensor) -> torch.Tensor:
        blocks = x[row // size]
        return blocks.gather(-1, turn[:, None].expand_as(blocks)).flatten(1)

    return moved(factors["numbers"], placed)


def fits(site: Site) -> bool:
    """Kernels of one size that together are as large as a matrix."""
    kernel = site.roles.get("c", ())
    if set(site.roles) != {"c"} or site.leaf != "weight" or len(kernel) != 3:
        return False
    return site.shape == (kernel[0] * kernel[2], kernel[1] * kernel[2])


RECIPE = Recipe(
    name="c3a",
    formula="W' = W + C / in",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    stored=True,
    elementwise=frozenset("c"),
)
