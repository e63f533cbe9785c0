"""Where the NaNs and infinities of a merged tensor come from."""

from __future__ import annotations

from torch import Tensor

from lora_check.number_kinds import name_of
from lora_check.replay import expected, tiles
from lora_check.rounding import FORMATS, half_cell
from lora_check.types import Case


def overflowed(case: Case, actual: Tensor) -> int:
    """How many numbers of a copied tensor a dtype of a lesser range turned into infinity.

    actual   (rows, columns), as stored
    """
    base = name_of(case.base.dtype)
    if not {base, case.storage} <= FORMATS.keys() or FORMATS[base].largest <= FORMATS[case.storage].largest:
        return 0
    return sum(int((actual[span].isinf() & case.base[span].isfinite()).sum()) for span in tiles(case))


def sources(case: Case, actual: Tensor) -> dict[str, int]:
    """What made them, as a phrase -> how many elements; the first phrase that holds counts.

    actual   (rows, columns), as stored
    """
    truth, found = expected(case), dict[str, int]()
    storage = case.storage
    for span in tiles(case):
        wrong = ~actual[span].isfinite()
        if not bool(wrong.any()):
            continue
        rows = truth.rows(span)
        total, start = rows.total.expand(wrong.shape)[wrong], rows.base.expand(wrong.shape)[wrong]
        left = wrong[wrong]
        for phrase, holds in (
            ("BASE has them", ~start.isfinite()),
            ("the adapter has them", ~total.isfinite()),
            (f"numbers of BASE are beyond {storage}", _beyond(start, storage)),
            (f"merged numbers are beyond {storage}", _beyond(total, storage)),
            ("merged numbers went through float16 and are beyond it", _beyond(total, "float16")),
            ("neither BASE nor the adapter accounts for them", left),
        ):
            found[phrase] = found.get(phrase, 0) + int((holds & left).sum())
            left = left & ~holds
    return {phrase: count for phrase, count in found.items() if count}


def _beyond(x: Tensor, storage: str) -> Tensor:
    """Which numbers are rounded to infinity: from the largest number and half a place more on."""
    largest = x.new_tensor([FORMATS[storage].largest])
    return x.abs() >= largest + half_cell(largest, storage)
