"""Where a measured difference changes its sign, in words that say between which measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Points = Sequence[tuple[float, float]]
"""(x, ratio - 1) in the order of x; below 0 it wins."""


def same(x: float) -> float:
    """The scale as it is."""
    return x


def crossing(
    points: Points, letter: str, scale: Callable[[float], float] = same, back: Callable[[float], float] = same
) -> str:
    """From which x on it wins: a straight line between the last measured loss and the win after it.

    scale, back   in which x is a straight line, and its inverse: log and exp for tokens
    """
    losses = [at for at, (_, value) in enumerate(points) if value >= 0]
    first, last = points[0][0], points[-1][0]
    only = "the only one measured" if len(points) == 1 else "the least measured"
    if not losses:
        return f"already at {letter} = {first:,.0f}, {only}"
    end = losses[-1]
    if end == len(points) - 1:
        most = only if len(points) == 1 else "the most measured"
        ever = "" if len(losses) == len(points) else " (though at fewer)"
        return f"not at {letter} = {last:,.0f}, {most}{ever}"
    (x, loss), (y, win) = points[end], points[end + 1]
    here = back(scale(x) + (scale(y) - scale(x)) * loss / (loss - win))
    return f"from about {letter} = {here:,.0f} on (interpolated between {x:,.0f} and {y:,.0f})"
