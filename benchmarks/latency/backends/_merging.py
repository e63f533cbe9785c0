"""W' = W + s B A: the tensor that a merged checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Site


def merged_weight(site: Site, adapter: int = 0) -> Tensor:
    """W + s B A, computed in float32 and rounded once to the dtype of W; (N, K)."""
    base, a, b = (one.detach() for one in (site.base.weight, site.a[adapter], site.b[adapter]))
    return torch.addmm(base.float(), b.float(), a.float(), alpha=site.s).to(base.dtype)
