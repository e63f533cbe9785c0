"""What a check is going to touch: items, checkpoints -> ranges of files, in the order in which they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lora_check.items import Item, pieces
from lora_check.links import Realigned
from lora_check.locations import Located
from lora_check.quantised import Decoded
from lora_check.reading.ranges import Placed, Range, in_step
from lora_check.types import Checkpoint, Plan


def ranges(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[Range, ...]:
    """The bytes behind these tensors, in their order; none for a tensor of which it is not known where it lies."""
    return tuple(found for name in names for found in _places(checkpoint, name))


def _places(checkpoint: Checkpoint, name: str) -> Iterator[Range]:
    if isinstance(checkpoint, Realigned):
        made = checkpoint.pieces.get(name, ())
        for source in dict.fromkeys(piece.source for piece in made) if made else (name,):
            yield from _places(checkpoint.inner, source)
    elif isinstance(checkpoint, Decoded):
        stored = checkpoint.stored.get(name)
        for part in stored.coded.parts.values() if stored else (name,):
            yield from _places(checkpoint.inner, part)
    elif isinstance(checkpoint, Located):
        yield from _places(checkpoint.inner, name)
    elif isinstance(checkpoint, Placed) and (found := checkpoint.place(name)):
        yield found


def touched(plan: Plan, item: Item, base: Checkpoint, merged: Checkpoint) -> tuple[Range, ...]:
    """What an item reads of both models, block by block, the two tensors in step."""
    pairing = plan.pairings[item.place]
    ours = ranges(base, [pairing.base.name]) if pairing.base else ()
    both = ranges(merged, [pairing.merged.name]), ours
    if item.rows is None:
        return tuple(in_step(*both))
    height = pieces(pairing)[-1].stop
    return tuple(in_step(*(_rows(some, item.rows, height) for some in both)))


def _rows(some: Sequence[Range], rows: tuple[int, int], height: int) -> Sequence[Range]:
    """These rows of a tensor, of `height` rows; of one that lies in several places all, with its first rows."""
    start, stop = rows
    if len(some) != 1:
        return some if start == 0 else ()
    path, offset, length = some[0]
    begin, end = length * start // height, length * stop // height
    return (Range(path, offset + begin, end - begin),)
