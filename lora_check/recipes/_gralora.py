"""GraLoRA's names, and its blocks as one product of two matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_check.recipes._numbers import whole
from lora_check.recipes._paired import is_turned, pair
from lora_check.types import Factors, Method, Site

if TYPE_CHECKING:
    from torch import Tensor


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The ranks of the blocks and of the part that is not in blocks."""
    return {"r": whole(raw, "r", 32, least=1), "hybrid_r": whole(raw, "hybrid_r", 0, least=0)}


def refuses(raw: Mapping[str, Any]) -> str:
    """A scale without its ingredients."""
    told = raw.get("alpha") is not None and raw.get("r") is not None
    return "" if told else "the configuration of a GraLoRA adapter does not say alpha and r"


METHOD = Method(
    name="GRALORA",
    roles={
        "gralora_A": "A",
        "gralora_B": "B",
        "gralora_A_general": "general_A",
        "gralora_B_general": "general_B",
    },
    keys=frozenset({"bias", "gralora_dropout", "gralora_k", "hybrid_r"}),
    alpha="alpha",
    patterns=False,
    settings=settings,
    refuses=refuses,
)


def blocks(factors: Factors, site: Site) -> Factors:
    """All blocks as one product of rank k r, in whose factors most is zero.

    A   (k, in / k, r): input block n keeps, for output block j, the columns j r / k to (j + 1) r / k
    B   (k, r, out / k): output block j keeps, for input block n, the rows n r / k to (n + 1) r / k
    """
    from lora_check.functions import moved

    return pair(moved(factors["B"], _outputs), moved(factors["A"], _inputs), site)


def _outputs(b: Tensor) -> Tensor:
    """B[j]^T along the diagonal: (j, r, o) -> (o, r, j) -> (o, r, j, j') -> (j o, j' r)."""
    k, r, size = b.shape
    return b.permute(2, 1, 0).diag_embed().permute(2, 0, 3, 1).reshape(k * size, k * r)


def _inputs(a: Tensor) -> Tensor:
    """A[n]^T in the columns of n, cut for each j: (n, i, j, s) -> (j, s, i, n) -> (j, s, i, n, n') -> (j n s, n' i)."""
    k, size, r = a.shape
    cut = a.reshape(k, size, k, r // k).permute(2, 3, 1, 0).diag_embed()
    return cut.permute(0, 3, 1, 4, 2).reshape(k * r, k * size)


def blocks_fit(site: Site) -> bool:
    """k blocks of inputs and of outputs with one rank, which k divides, and which the configuration says."""
    a, b = site.roles.get("A", ()), site.roles.get("B", ())
    if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[2] != b[1] or a[2] % a[0] or a[2] != site.settings.get("r"):
        return False
    return len(site.shape) == 2 and is_turned(site, a[0] * b[2], a[0] * a[1]) is not None
