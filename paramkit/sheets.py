"""Cells of memory on a sheet: where strided views lie, which of them meet, exact for any strides.

A sheet is a small array that stands for the memory under some views. There are two kinds:

- a grid. Where the strides of all views, sorted, divide one another, an address is a number in a mixed
  radix, and a view is a few boxes of digits. Each digit is cut where some box begins or ends, and a whole
  interval is one place of the array: 64 million elements that 250 views share column by column are 250 places.
- a window. Otherwise one place stands for a granule, the largest unit that every view starts on, steps by
  and covers whole, and a long stretch of memory is looked at window by window.

Addresses and strides are in any one unit (elements of one tensor, or bytes); a cell is one such unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import gcd, prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Form",
    "Placed",
    "Sheet",
    "count_distinct",
    "form_of",
    "meetings",
    "overlaps_itself",
    "place_marks",
    "sheets",
]

GRID_PLACES = 1_000_000  # a larger grid is no better than a map
GRID_BOXES = 1024  # of one view; more, and cutting costs more than a map
GRID_DIGITS = 24  # numpy 1 has arrays of up to 32 dimensions
MAP_BYTES = 256 << 20  # at most, of the arrays of two windows, as which they come and go
CACHE_BYTES = 16 << 20  # the same for few views: what stays in a cache is marked faster
VIEW_BYTES = 64 << 10  # more for each view, since every view costs a look at every window
CACHED_VIEWS = 64  # a longer list of views is not kept: layers repeat short ones


class Form(NamedTuple):
    """The set of cells of a view, wherever it starts: loops around a run of adjacent cells.

    Attributes:
        run: adjacent cells in the innermost loop.
        loops: (size, stride) of the loops around it, strides ascending, as few as there can be.
        span: cells from the first to the last of the view, both counted.
        total: cells of all elements together, axes of stride 0 counted once.
        distinct: how many different cells that are, -1 where only counting can tell.
        folded: whether an axis of stride 0 repeats every element.
    """

    run: int
    loops: tuple[tuple[int, int], ...]
    span: int
    total: int
    distinct: int
    folded: bool


Placed = tuple[int, Form]  # the address of the first cell, and the form


@lru_cache(maxsize=1 << 14)
def form_of(sizes: Sequence[int], strides: Sequence[int], width: int = 1) -> Form | None:
    """The cells of a view with these sizes and strides; None if it has no element.

    Args:
        sizes, strides: tuples, one entry for each axis; strides in elements, not negative.
        width: cells of one element.

    Raises:
        ValueError: a negative stride, or not as many strides as sizes.

    Example:
        >>> form_of((2, 3, 4), (24, 4, 1))
        Form(run=12, loops=((2, 24),), span=36, total=24, distinct=24, folded=False)
    """
    axes = sorted((s, n) for n, s in zip(sizes, strides, strict=True) if n != 1)
    if 0 in sizes:
        return None
    if axes and axes[0][0] < 0:
        raise ValueError(f"strides {tuple(strides)}: expected none below 0")
    total = prod((n for s, n in axes if s), start=width)
    levels = [(width, 1)]
    for stride, size in axes:
        if stride == 0:
            continue
        stride *= width
        inner, step = levels[-1]
        if stride % step == 0 and inner * step >= stride:  # no gap: one longer loop
            levels[-1] = inner + (size - 1) * (stride // step), step
        else:
            levels.append((size, stride))
    span, apart = 1, True
    for size, stride in levels:
        apart &= stride >= span
        span += (size - 1) * stride
    distinct = prod(size for size, _ in levels) if apart else -1
    folded = bool(axes) and axes[0][0] == 0
    return Form(levels[0][0], tuple(levels[1:]), span, total, distinct, folded)


@lru_cache(maxsize=1 << 12)
def overlaps_itself(form: Form) -> bool:
    """Whether two elements of a view share a cell; an axis of stride 0 does not count."""
    return count_distinct(form) < form.total


@lru_cache(maxsize=1 << 12)
def count_distinct(form: Form) -> int:
    """How many cells a view touches."""
    if form.distinct >= 0:
        return form.distinct
    found = 0
    for sheet in sheets([(0, form)], 2):
        marks: NDArray[np.bool_] = np.zeros(sheet.shape, np.bool_)
        for view in sheet.views(marks, 0):
            view[...] = True
        found += sheet.count(marks)
    return found


def meetings(
    writers: Sequence[Placed], readers: Sequence[Placed] = ()
) -> tuple[list[int | None], list[int | None]]:
    """Which views share a cell with which.

    Returns:
        (for each writer the first of the writers before it that it shares a cell with, for each reader the
        first of all writers that it shares a cell with), None where there is none.

    Example:
        >>> row, column = form_of((4,), (1,)), form_of((4,), (4,))
        >>> meetings([(0, row), (4, row), (5, column)], [(8, row)])
        ([None, None, 1], [2])
    """
    if not writers:
        return [], [None] * len(readers)
    base = min(start for start, _ in (*writers, *readers))
    near = tuple((start - base, form) for start, form in writers)
    read = tuple((start - base, form) for start, form in readers)
    find = _meetings if len(near) + len(read) <= CACHED_VIEWS else _meetings.__wrapped__
    own, theirs = find(near, read)
    return list(own), list(theirs)


@lru_cache(maxsize=1024)
def _meetings(
    writers: tuple[Placed, ...], readers: tuple[Placed, ...]
) -> tuple[list[int | None], list[int | None]]:
    nobody = len(writers)
    own, theirs = [nobody] * nobody, [nobody] * len(readers)
    kind = np.min_scalar_type(nobody)
    for sheet in sheets([*writers, *readers], kind.itemsize):
        marks = np.full(sheet.shape, nobody, kind)
        place_marks(sheet, marks, own)
        for k, least in enumerate(theirs):
            for view in sheet.views(marks, nobody + k):
                least = min(least, int(view.min()))
            theirs[k] = least
    return (
        [None if first == nobody else first for first in own],
        [None if first == nobody else first for first in theirs],
    )


def place_marks(sheet: Sheet, marks: NDArray[np.generic], first: list[int]) -> None:
    """Let view k mark each of its places with k, unless a view before it has.

    Args:
        sheet: of at least `len(first)` views.
        marks: an array of the sheet's shape, filled with `len(first)`; changed in place.
        first: for each view the first one that it has met, `len(first)` for none; changed in place.
    """
    for k, least in enumerate(first):
        mark = marks.dtype.type(k)
        for view in sheet.views(marks, k):
            met = int(view.min())
            if met > k:
                view.fill(mark)
                continue
            np.minimum(view, mark, out=view)
            if met < k:  # k itself where the view overlaps itself
                least = min(least, met)
        first[k] = least


# ---- sheets --------------------------------------------------------------------------------------


class Sheet(Protocol):
    """A part of memory as an array, in which every place is wholly in a view or wholly outside it."""

    shape: tuple[int, ...]

    def views(self, array: NDArray[np.generic], k: int) -> Iterator[NDArray[np.generic]]:
        """The places of view number k in an array of this shape: none of the views is empty."""
        ...

    def count(self, mask: NDArray[np.bool_]) -> int:
        """How many cells the places that are True stand for."""
        ...

    def lowest(self, mask: NDArray[np.bool_]) -> int | None:
        """The least address among the places that are True, None if none is."""
        ...


def sheets(items: Sequence[Placed], place_bytes: int) -> Iterator[Sheet]:
    """The memory under some views: one grid, or windows in the order of addresses.

    Args:
        items: the views; at least one.
        place_bytes: what the caller's arrays take for one place, all together.
    """
    base = min(start for start, _ in items)
    granule = gcd(*(start - base for start, _ in items), *(form.run for _, form in items))
    granule = gcd(granule, *{stride for _, form in items for _, stride in form.loops})
    parts = [
        (
            (start - base) // granule,
            (form.run // granule, 1),
            *((n, s // granule) for n, s in form.loops),
        )
        for start, form in items
    ]
    grid = _grid(parts, base, granule)
    if grid is not None:
        yield grid
        return
    places = max(start - base + form.span for start, form in items) // granule
    room = min(MAP_BYTES, max(CACHE_BYTES, len(items) * VIEW_BYTES))
    step = max(
        1, room // (2 * place_bytes)
    )  # a caller has the next arrays before it lets the last go
    for low in range(0, places, step):
        yield _Window(parts, base, granule, low, min(places, low + step))


# A view in granules: its first place, then (size, stride) of its loops, the innermost with stride 1.
_Part = tuple[Any, ...]  # int, tuple[int, int], ..
_Box = tuple[tuple[int, int], ...]  # [begin, end) of each digit, the least significant first


class _Grid:
    """Boxes of digits, each digit cut at the ends of the boxes."""

    def __init__(
        self,
        boxes: Sequence[Sequence[_Box]],
        edges: Sequence[Sequence[int]],
        units: Sequence[int],
        base: int,
        granule: int,
    ) -> None:
        # The most significant digit is the first axis, so that the order of places is that of addresses.
        self._edges = list(reversed(edges))
        self._units = [unit * granule for unit in reversed(units)]
        self._base, self._granule = base, granule
        self.shape = tuple(len(cuts) - 1 for cuts in self._edges)
        at = [{edge: k for k, edge in enumerate(cuts)} for cuts in self._edges]
        self._slices = [
            [
                tuple(slice(place[a], place[b]) for place, (a, b) in zip(at, reversed(box)))
                for box in own
            ]
            for own in boxes
        ]

    def views(self, array: NDArray[np.generic], k: int) -> Iterator[NDArray[np.generic]]:
        for slices in self._slices[k]:
            yield array[slices]

    def count(self, mask: NDArray[np.bool_]) -> int:
        total = mask.astype(np.int64)
        for cuts in reversed(self._edges):
            total = total @ np.diff(np.array(cuts, np.int64)).astype(np.int64)
        return int(total) * self._granule

    def lowest(self, mask: NDArray[np.bool_]) -> int | None:
        first = int(mask.argmax())
        if not mask.flat[first]:
            return None
        address = self._base
        for k, cuts, unit in zip(np.unravel_index(first, self.shape), self._edges, self._units):
            address += cuts[int(k)] * unit
        return address


def _grid(parts: Sequence[_Part], base: int, granule: int) -> _Grid | None:
    """The grid of these views, None where there is none or it would be too large."""
    units = sorted({1, *(stride for _, *loops in parts for _, stride in loops)})
    radices = [above // unit for unit, above in pairwise(units)]
    if len(units) > GRID_DIGITS or any(b % a for a, b in pairwise(units)):
        return None
    boxes = []
    for part in parts:
        own = _boxes(part, units, radices)
        if own is None:
            return None
        boxes.append(own)
    edges = [
        sorted({edge for own in boxes for box in own for edge in box[digit]})
        for digit in range(len(units))
    ]
    if prod(len(cuts) - 1 for cuts in edges) > GRID_PLACES:
        return None
    return _Grid(boxes, edges, units, base, granule)


def _boxes(part: _Part, units: Sequence[int], radices: Sequence[int]) -> list[_Box] | None:
    """A view as boxes of digits, None where they would be too many.

    A loop that passes the end of its digit goes on in the next: the digit's first and last round are boxes of
    their own, and the full rounds between them are one, with an interval of carries.
    """
    start, *loops = part
    size_of = {stride: size for size, stride in loops}
    states: list[tuple[_Box, int, int]] = [
        ((), 0, 0)
    ]  # the digits so far, least and greatest carry
    for unit, radix in zip(units, radices):
        digit, size = start // unit % radix, size_of.get(unit, 1)
        after = []
        for box, carry, most in states:
            low, high = digit + carry, digit + most + size  # [low, high), not yet carried
            first, last = low // radix, (high - 1) // radix
            if first == last:
                after.append(((*box, (low - first * radix, high - first * radix)), first, first))
                continue
            if low % radix:
                after.append(((*box, (low - first * radix, radix)), first, first))
                first += 1
            if high % radix:
                after.append(((*box, (0, high - last * radix)), last, last))
                last -= 1
            if first <= last:
                after.append(((*box, (0, radix)), first, last))
        if len(after) > GRID_BOXES:
            return None
        states = after
    digit, size = start // units[-1], size_of.get(units[-1], 1)
    return [(*box, (digit + carry, digit + most + size)) for box, carry, most in states]


class _Window:
    """The granules [low, high) of the map."""

    def __init__(
        self, parts: Sequence[_Part], base: int, granule: int, low: int, high: int
    ) -> None:
        self._parts, self._base, self._granule = parts, base, granule
        self._low, self._high = low, high
        self.shape: tuple[int, ...] = (high - low,)

    def views(self, array: NDArray[np.generic], k: int) -> Iterator[NDArray[np.generic]]:
        start, *loops = self._parts[k]
        span = 1 + sum((size - 1) * stride for size, stride in loops)
        yield from self._pieces(array, start, tuple(loops), span)

    def _pieces(
        self, array: NDArray[np.generic], start: int, loops: tuple[tuple[int, int], ...], span: int
    ) -> Iterator[NDArray[np.generic]]:
        """What lies in the window of a view: whole rounds of its outermost loop, and parts of some others."""
        low, high = self._low, self._high
        if start >= high or start + span <= low:
            return
        if low <= start and start + span <= high:
            width = array.itemsize
            shape = [size for size, _ in reversed(loops)]
            strides = [stride * width for _, stride in reversed(loops)]
            yield np.ndarray(shape, array.dtype, array, (start - low) * width, strides)
            return
        size, stride = loops[-1]
        if len(loops) == 1:
            yield array[max(start, low) - low : min(start + span, high) - low]
            return
        inner = span - (size - 1) * stride
        touched = (
            max(0, (low - inner - start) // stride + 1),
            min(size, -((start - high) // stride)),
        )
        whole = max(0, -((start - low) // stride)), min(size, (high - inner - start) // stride + 1)
        if whole[0] < whole[1]:
            rounds = whole[1] - whole[0]
            yield from self._pieces(
                array,
                start + whole[0] * stride,
                (*loops[:-1], (rounds, stride)),
                inner + (rounds - 1) * stride,
            )
        else:
            whole = touched[1], touched[1]
        for k in (*range(touched[0], whole[0]), *range(whole[1], touched[1])):
            yield from self._pieces(array, start + k * stride, loops[:-1], inner)

    def count(self, mask: NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(mask)) * self._granule

    def lowest(self, mask: NDArray[np.bool_]) -> int | None:
        first = int(mask.argmax())
        return self._base + (self._low + first) * self._granule if mask[first] else None
