"""Exact coverage: which elements of a tensor do views of it touch, which twice, and which not at all?

Almost every tensor is written whole, by one view, and that costs a comparison. Views that are intervals are sorted and
swept. Anything else goes on a sheet (see `sheets`), whose result is kept: layers repeat the same views.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sheets import (
    CACHED_VIEWS,
    Form,
    count_distinct,
    form_of,
    overlaps_itself,
    place_marks,
    sheets,
)

__all__ = ["Coverage", "Region", "cover", "missing_text"]


class Region(NamedTuple):
    """A strided view, in any one unit (elements, or bytes).

    Attributes:
        offset: of the first element.
        sizes, strides: tuples with one entry for each axis; no stride is negative. An axis of stride 0 or of
            size 1 adds no cell, and a region with an axis of size 0 has none.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """What regions do to a space. A cell is one address; elements of an expanded axis are the same cell.

    Attributes:
        covered: distinct cells of the space that at least one region touches.
        twice: (first, second), indices of two regions that share a cell, in the space or outside it, or (k, k)
            for a region that touches a cell twice; the least second, then the least first. None: no such cell.
        missing: distinct cells of the space that no region touches.
        first_missing: the index of the first of them, in the space's own dimensions and in row-major order.
    """

    covered: int
    twice: tuple[int, int] | None
    missing: int
    first_missing: tuple[int, ...] | None


def cover(space: Region, regions: Sequence[Region]) -> Coverage:
    """What of a space do regions touch, what twice, and what not at all?

    Exact for any sizes, strides and offsets; regions may reach outside the space. One region that is the whole space
    costs a comparison, and n intervals O(n log n).

    Args:
        space: a tensor's memory: its sizes and strides, and the address of its first element, usually 0.
        regions: views into the same memory, in the same unit and from the same origin.

    Raises:
        ValueError: a stride is negative, or there are not as many strides as sizes.

    Example:
        >>> left, right = Region(0, (4, 3), (6, 1)), Region(3, (4, 3), (6, 1))
        >>> cover(Region(0, (4, 6), (6, 1)), [left, right])
        Coverage(covered=24, twice=None, missing=0, first_missing=None)
        >>> cover(Region(0, (4, 6), (6, 1)), [left, left])
        Coverage(covered=12, twice=(0, 1), missing=12, first_missing=(0, 3))
    """
    if len(regions) == 1 and regions[0] == space:
        return _whole(space.sizes, space.strides)
    home = form_of(space.sizes, space.strides)
    forms = [form_of(sizes, strides) for _, sizes, strides in regions]
    if len(regions) == 1 and forms[0] == home and regions[0].offset == space.offset:
        # The whole space, with axes split or put together.
        return _whole(regions[0].sizes, regions[0].strides)
    if home is not None and not home.loops and all(f is None or not f.loops for f in forms):
        spans = [
            (r.offset, r.offset + f.run, k)
            for k, (r, f) in enumerate(zip(regions, forms))
            if f is not None
        ]
        return _place_first(_sweep(space, home, spans, forms), space, regions)
    if len(regions) > CACHED_VIEWS:
        return _measure(space, tuple(regions))
    if space.offset == 0:
        return _measured(space, tuple(regions))
    moved = tuple(r._replace(offset=r.offset - space.offset) for r in regions)
    return _measured(space._replace(offset=0), moved)


def missing_text(space: Region, regions: Sequence[Region]) -> str:
    """What of a space no region touches, for people: an index where it is one box, else a count.

    Returns:
        "[4096:8192, :]" or "12 elements, the first at [0, 3]"; "" if nothing is missing.

    Raises:
        ValueError: as `cover`.

    Example:
        >>> missing_text(Region(0, (4, 6), (6, 1)), [Region(0, (4, 3), (6, 1))])
        '[:, 3:6]'
        >>> missing_text(Region(0, (4, 6), (6, 1)), [Region(0, (4, 3), (6, 2))])
        '12 elements, the first at [0, 1]'
    """
    found = cover(space, regions)
    first = found.first_missing
    if first is None:
        return ""
    home = form_of(space.sizes, space.strides)
    assert home is not None
    if not overlaps_itself(home):
        # If all that is missing is one box, then the first missing element is its corner, and the box reaches
        # along each axis as far as there is anything missing on the line through the corner.
        corner = space.offset + sum(k * stride for k, stride in zip(first, space.strides))
        lengths = []
        for axis, (start, size, stride) in enumerate(zip(first, space.sizes, space.strides)):
            line = [1] * len(first)
            line[axis] = size - start
            repeated = stride == 0 or size == 1
            part = Region(corner, tuple(line), space.strides)
            lengths.append(size if repeated else cover(part, regions).missing)
        box = Region(corner, tuple(lengths), space.strides)
        cells = prod(n for n, stride in zip(lengths, space.strides) if stride)
        if cells == found.missing == cover(box, regions).missing:
            return _index_text(first, lengths, space.sizes)
    many = "1 element" if found.missing == 1 else f"{found.missing} elements, the first"
    return f"{many} at [{', '.join(map(str, first))}]"


def _index_text(corner: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]) -> str:
    texts = []
    for start, length, size in zip(corner, lengths, sizes):
        if length == size:
            texts.append(":")
        else:
            texts.append(str(start) if length == 1 else f"{start}:{start + length}")
    return f"[{', '.join(texts) or '...'}]"


# covered, missing, the lowest address of those, twice
_Found = tuple[int, int, int | None, tuple[int, int] | None]

# ---- one view, and intervals ---------------------------------------------------------------------


@lru_cache(maxsize=1 << 14)
def _whole(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Coverage:
    form = form_of(sizes, strides)
    if form is None:
        return Coverage(0, None, 0, None)
    return Coverage(count_distinct(form), (0, 0) if overlaps_itself(form) else None, 0, None)


def _sweep(
    space: Region,
    home: Form,
    spans: list[tuple[int, int, int]],
    forms: Sequence[Form | None],
) -> _Found:
    """(covered, missing, least missing address, twice), where the space and all regions are intervals.

    Args:
        spans: (begin, end, index) of each region that is not empty, in the order of the indices.
    """
    begin, end = space.offset, space.offset + home.run
    reach, covered, lowest, meet = begin, 0, None, False
    last = None  # where the interval before ends; if any two meet, then so do some two neighbours
    for low, high, _ in sorted(spans):
        meet |= last is not None and low < last
        last = high
        if low > reach and lowest is None and reach < end:
            lowest = reach
        low, high = max(low, reach), min(high, end)
        if low < high:
            covered += high - low
            reach = high
    if lowest is None and reach < end:
        lowest = reach
    return covered, home.run - covered, lowest, _twice_of(spans, forms, meet)


def _twice_of(
    spans: Sequence[tuple[int, int, int]], forms: Sequence[Form | None], meet: bool
) -> tuple[int, int] | None:
    """The first interval that meets one before it or itself; `meet`: whether any two do."""
    alone = next((k for _, _, k in spans if _folds(forms[k])), None)
    if meet:
        sorted_spans: list[tuple[int, int, int]] = []  # apart from one another
        for span in spans:
            low, high, k = span
            place = bisect_left(sorted_spans, span)
            left = place > 0 and sorted_spans[place - 1][1] > low
            right = place < len(sorted_spans) and sorted_spans[place][0] < high
            if left or right:
                return min(j for a, b, j in sorted_spans if a < high and low < b), k
            if k == alone:
                break
            sorted_spans.insert(place, span)
    return None if alone is None else (alone, alone)


def _folds(form: Form | None) -> bool:
    """`overlaps_itself` of an interval, whose distinct cells are always known."""
    return form is not None and form.distinct < form.total


# ---- anything ------------------------------------------------------------------------------------


def _measure(space: Region, regions: tuple[Region, ...]) -> Coverage:
    return _place_first(_count(space, regions), space, regions)


def _count(space: Region, regions: Sequence[Region]) -> _Found:
    home = form_of(space.sizes, space.strides)
    live = [(k, form_of(sizes, strides)) for k, (_, sizes, strides) in enumerate(regions)]
    placed = [(regions[k].offset, form) for k, form in live if form is not None]
    at = [k for k, form in live if form is not None]
    nobody = len(placed)
    first = [nobody] * nobody
    kind = np.min_scalar_type(nobody)
    items = placed if home is None else [*placed, (space.offset, home)]
    covered, missing, lowest = 0, 0, None
    # Of each place: the mark, whether it is of the space, and two results of comparing.
    for sheet in sheets(items, kind.itemsize + 3) if items else ():
        marks = np.full(sheet.shape, nobody, kind)
        place_marks(sheet, marks, first)
        if home is None:
            continue
        wanted: NDArray[np.bool_] = np.zeros(sheet.shape, np.bool_)
        for view in sheet.views(wanted, nobody):
            view[...] = True
        touched = marks != nobody
        touched &= wanted
        covered += sheet.count(touched)
        wanted ^= touched
        missing += sheet.count(wanted)
        if lowest is None:
            lowest = sheet.lowest(wanted)
    for k, (_, form) in enumerate(placed):
        if first[k] < k or overlaps_itself(form):
            return covered, missing, lowest, (at[min(first[k], k)], at[k])
    return covered, missing, lowest, None


_measured = lru_cache(maxsize=1024)(_measure)


def _place_first(found: _Found, space: Region, regions: Sequence[Region]) -> Coverage:
    """The result, with the index of the first missing element."""
    covered, missing, lowest, twice = found
    if lowest is None:
        return Coverage(covered, twice, 0, None)
    index: list[int] = []
    offset, reach = lowest - space.offset, 1
    for size, stride in reversed(list(zip(space.sizes, space.strides))):
        if size == 1 or stride == 0:
            continue
        if stride < reach:  # rows are not in the order of addresses
            return Coverage(covered, twice, missing, _search(space, regions))
        reach = size * stride
    for size, stride in zip(space.sizes, space.strides):
        k = 0 if size == 1 or stride == 0 else offset // stride
        index.append(k)
        offset -= k * stride
    return Coverage(covered, twice, missing, tuple(index))


def _search(space: Region, regions: Sequence[Region]) -> tuple[int, ...]:
    """The first missing element of a space that has one, halving axis by axis."""
    index: list[int] = []
    offset, sizes = space.offset, list(space.sizes)
    for axis, (size, stride) in enumerate(zip(space.sizes, space.strides)):
        low, high = 0, 1 if stride == 0 else size  # the first one is in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            sizes[axis] = middle - low
            part = Region(offset + low * stride, tuple(sizes), space.strides)
            if _count(part, regions)[1]:
                high = middle
            else:
                low = middle
        sizes[axis] = 1
        offset += low * stride
        index.append(low)
    return tuple(index)
