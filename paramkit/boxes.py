"""Writes cut into boxes that lie within parts of tensors, exactly.

A write is a nest of loops over addresses; a part of a tensor is an interval, or several, of each axis. So
the loops are taken apart by axes: a loop of a stride moves one axis by a step. An axis that a pattern
splits ("(g r d) e") has several loops, and a part may begin in the middle of any of them: the outer loop is
then cut into the turns that lie within the part as a whole, and the turn at each end, cut further inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

from .sources.lazy import contiguous_strides
from .sources.spread import Segment, Spread

__all__ = [
    "Box",
    "Geometry",
    "Side",
    "boxes",
    "clip",
    "elements",
    "halved",
    "pieces_within",
    "placed",
]

# Of two views of the same sizes: (sizes, strides, offset, strides, offset), as in a `Write`.
Geometry = tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...], int]
Axes = tuple[tuple[Segment, ...], ...]
# Turns of a loop: its number, the first turn, how many.
Turns = tuple[int, int, int]


class Side(NamedTuple):
    """Where the loops of a box are in one tensor: loop i moves index `axes[i]` by `steps[i]`, from `base` on.

    A tensor that is not in parts has one axis, its addresses; one without axes has one too, of one index.
    """

    axes: tuple[int, ...]
    steps: tuple[int, ...]
    base: tuple[int, ...]


class Box(NamedTuple):
    """Loops over two tensors side by side."""

    sizes: tuple[int, ...]
    first: Side
    second: Side


def elements(box: Box) -> int:
    """How many elements a box has."""
    return prod(box.sizes)


def boxes(
    geometry: Geometry, first: tuple[int, ...] | None, second: tuple[int, ...] | None
) -> Iterator[Box]:
    """A pair of views as boxes: one, unless a loop runs on from one row to the next.

    Args:
        geometry: sizes, and for each side strides and offset, in elements of a contiguous tensor.
        first, second: the shapes of the tensors, None for one that is not in parts.

    >>> (box,) = boxes(((2, 3), (3, 1), 0, (1, 2), 0), None, (3, 2))
    >>> box.first, box.second.axes
    (Side(axes=(0, 0), steps=(3, 1), base=(0,)), (1, 0))
    """
    sizes, strides_a, offset_a, strides_b, offset_b = geometry
    if 0 in sizes:
        return
    sides: list[Side] = []
    for shape, strides, offset in ((first, strides_a, offset_a), (second, strides_b, offset_b)):
        side = _side(sizes, strides, offset, shape)
        if not isinstance(side, Side):
            for part in _parted(geometry, *side):
                yield from boxes(part, first, second)
            return
        sides.append(side)
    yield Box(sizes, sides[0], sides[1])


def _side(
    sizes: Sequence[int], strides: Sequence[int], offset: int, shape: Sequence[int] | None
) -> Side | tuple[int, int, int]:
    """The side, or (loop, turns to the end of the row, turns of a row) of a loop that crosses rows."""
    if shape is None:
        return Side((0,) * len(sizes), tuple(strides), (offset,))
    if not shape:  # one element, that every loop stays at
        return Side((0,) * len(sizes), (0,) * len(sizes), (0,))
    row = contiguous_strides(shape)
    base, rest = [], offset
    for n, step in zip(shape, row, strict=True):
        base.append(rest // step if n > 1 else 0)
        rest -= base[-1] * step
    axes, steps = [], []
    reach = list(base)
    for loop, (n, stride) in enumerate(zip(sizes, strides, strict=True)):
        # The axis whose index moves by whole steps: the last one whose stride fits.
        axis = step = 0
        if n > 1 and stride:
            fits = [
                k
                for k, (m, st) in enumerate(zip(shape, row, strict=True))
                if m > 1 and st <= stride
            ]
            axis = fits[0]
            step, odd = divmod(stride, row[axis])
            if odd:
                return loop, 1, 1  # by itself, turn for turn
            reach[axis] += (n - 1) * step
            if reach[axis] >= shape[axis]:
                alone = shape[axis] % step == 0 and base[axis] < shape[axis]
                turns = -(-(shape[axis] - base[axis]) // step)
                return loop, turns, shape[axis] // step if alone else 1
        axes.append(axis)
        steps.append(step)
    return Side(tuple(axes), tuple(steps), tuple(base))


def _parted(geometry: Geometry, loop: int, head: int, row: int) -> Iterator[Geometry]:
    """The turns of a loop up to the end of a row, the whole rows as a loop of their own, and the rest."""
    sizes, sa, oa, sb, ob = geometry
    n = sizes[loop]

    def turns(first: int, counts: tuple[int, ...], steps: tuple[int, ...]) -> Geometry:
        a, b = sa[loop], sb[loop]
        return (
            (*sizes[:loop], *counts, *sizes[loop + 1 :]),
            (*sa[:loop], *(a * k for k in steps), *sa[loop + 1 :]),
            oa + first * a,
            (*sb[:loop], *(b * k for k in steps), *sb[loop + 1 :]),
            ob + first * b,
        )

    if row <= 1 or head >= n:  # no rows to speak of: halves, down to single turns
        half = n // 2
        yield turns(0, (half,), (1,))
        yield turns(half, (n - half,), (1,))
        return
    head %= row
    if head:
        yield turns(0, (head,), (1,))
    rows = (n - head) // row
    if rows:
        yield turns(head, (rows, row), (row, 1))
    done = head + rows * row
    if done < n:
        yield turns(done, (n - done,), (1,))


def clip(box: Box, second: bool, axes: Axes) -> Iterator[Box]:
    """The boxes of a box that lie within a part, in the order of their indices.

    Args:
        box: what is cut.
        second: which of its sides the part belongs to.
        axes: of the part.

    Yields:
        Boxes whose side has its base in the part's own indices.

    >>> (box,) = boxes(((4, 3), (3, 1), 0, (3, 1), 0), (4, 3), None)
    >>> lower = ((Segment(2, 2, 0),), (Segment(0, 3, 0),))
    >>> [(b.sizes, b.first.base, b.second.base) for b in clip(box, False, lower)]
    [((2, 3), (0, 0), (6,))]
    """
    side = box.second if second else box.first
    loops: list[list[Turns]] = [[] for _ in axes]
    for k, (n, axis, step) in enumerate(zip(box.sizes, side.axes, side.steps, strict=True)):
        if n > 1 and step:
            loops[axis].append((k, n, step))
    found = []
    for axis, segments in enumerate(axes):
        key = tuple(sorted(loops[axis], key=lambda loop: -loop[2]))
        found.append(_within(key, side.base[axis], segments))
    for chosen in product(*found):
        yield _narrowed(box, second, chosen)


# What is chosen on one axis: the turns of its loops, and how far the base moves into the part's own indices.
_Choice = tuple[tuple[Turns, ...], int]


@lru_cache(maxsize=1 << 16)
def _within(
    loops: tuple[Turns, ...], base: int, segments: tuple[Segment, ...]
) -> tuple[_Choice, ...]:
    return tuple(
        (turns, s.at - s.start)
        for s in segments
        for turns in _turns(loops, base, s.start, s.start + s.length)
    )


def _turns(loops: Sequence[Turns], base: int, low: int, high: int) -> Iterator[tuple[Turns, ...]]:
    """The turns of nested loops that reach indices in [low, high), outermost loop first."""
    span = sum((n - 1) * step for _, n, step in loops)
    if base >= high or base + span < low:
        return
    if base >= low and base + span < high:
        yield ()
        return
    (k, n, step), inner = loops[0], loops[1:]
    span -= (n - 1) * step
    first = max(0, -(-(low - base - span) // step))
    last = min(n - 1, (high - 1 - base) // step)
    whole_first = max(0, -(-(low - base) // step))
    whole_last = min(n - 1, (high - 1 - base - span) // step)
    turn = first
    while turn <= last:
        if whole_first <= turn <= whole_last:
            yield ((k, turn, whole_last - turn + 1),)
            turn = whole_last + 1
            continue
        for rest in _turns(inner, base + turn * step, low, high):
            yield ((k, turn, 1), *rest)
        turn += 1


def _narrowed(box: Box, second: bool, chosen: Iterable[_Choice]) -> Box:
    sizes = list(box.sizes)
    bases = [list(box.first.base), list(box.second.base)]
    sides = (box.first, box.second)
    for axis, (turns, shift) in enumerate(chosen):
        bases[second][axis] += shift
        for k, start, count in turns:
            sizes[k] = count
            for side, base in zip(sides, bases):
                base[side.axes[k]] += start * side.steps[k]
    first, other = (side._replace(base=tuple(base)) for side, base in zip(sides, bases))
    return Box(tuple(sizes), first, other)


def placed(side: Side, strides: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Strides and offset of a side, given the strides of its tensor: (1,) for one that is not in parts.

    >>> placed(Side((1, 0), (1, 2), (0, 3)), (10, 1))
    ((1, 20), 3)
    """
    axes, steps, base = side
    if not strides:
        return (0,) * len(steps), 0
    # Lists: this runs for every piece of every tensor, and generators take twice as long.
    found = tuple([step * strides[axis] for axis, step in zip(axes, steps)])
    return found, sum([index * stride for index, stride in zip(base, strides)])


def halved(box: Box, limit: int) -> Iterator[Box]:
    """A box as boxes of at most `limit` elements, by halving its outermost loops."""
    if elements(box) <= limit:
        yield box
        return
    k = next(i for i, n in enumerate(box.sizes) if n > 1)
    half = box.sizes[k] // 2
    for start, count in ((0, half), (half, box.sizes[k] - half)):
        sizes = (*box.sizes[:k], count, *box.sizes[k + 1 :])
        yield from halved(
            Box(sizes, _moved(box.first, k, start), _moved(box.second, k, start)), limit
        )


def _moved(side: Side, loop: int, turns: int) -> Side:
    base, axis = list(side.base), side.axes[loop]
    base[axis] += turns * side.steps[loop]
    return side._replace(base=tuple(base))


def pieces_within(
    spread: Spread, sizes: Sequence[int], strides: Sequence[int], offset: int
) -> Iterator[tuple[Geometry, Any]]:
    """A view of a tensor in parts, cut by its parts.

    Yields:
        (sizes, strides and offset in a contiguous tensor of the view's sizes, strides and offset in the
        part), and what holds the part.
    """
    geometry = (tuple(sizes), contiguous_strides(sizes), 0, tuple(strides), offset)
    for box in boxes(geometry, None, tuple(spread.shape)):
        for part in spread.parts:
            if part.held is None:
                continue
            for piece in clip(box, True, part.axes):
                own = placed(piece.second, part.held.stride())
                yield (piece.sizes, *placed(piece.first, (1,)), *own), part.held
