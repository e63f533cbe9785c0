"""W' = W + k Re F^-1(C).

W   base          (out, in), or (in, out) in a Conv1D of transformers
c   coefficients  (n,), stored as `fourierft_spectrum`
C   spectrum      (out, in): c at the first n places of torch.randperm(out in) seeded with random_loc_seed, else zero
k   factor        the configuration's `scaling`

The same bits as long as torch uses the same transform; another library's are within `rounding.fourier`. Source: Gao et
al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform" (2024); PEFT tuners/fourierft/layer.py
FourierFTLayer.update_layer, get_delta_weight.
"""

from collections.abc import Mapping
from typing import Any

from lora_check.recipes._spectrum import COMMON, fits, oriented, places, seed_and_scale, seedless
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The seed and k."""
    return seed_and_scale(raw, scaling=150.0)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The delta, as the weight is kept."""
    import torch

    from lora_check.functions import inverse_fourier, moved

    at, shape = places(site), oriented(site)

    def spread(c: torch.Tensor) -> torch.Tensor:
        full = c.new_zeros(shape)
        full[at] = c
        return full

    delta = inverse_fourier(moved(factors["c"], spread)) * site.settings["scaling"]
    return {"delta": delta.T if site.in_out else delta}


def product(factors: Factors, rows: slice) -> Numbers:
    """The delta's rows."""
    return factors["delta"][rows]


METHOD = Method(name="FOURIERFT", roles={"fourierft_spectrum": "c"}, keys=COMMON, settings=settings, refuses=seedless)
RECIPE = Recipe(
    name="fourierft",
    formula="W' = W + k Re F^-1(C)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    elementwise=frozenset("c"),
)
