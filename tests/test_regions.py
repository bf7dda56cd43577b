"""What regions cover, against marking every cell: grids, maps, windows, and the patterns of real layouts."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paramkit import regions, sheets
from paramkit.patterns import compile as compile_pattern
from paramkit.regions import Coverage, Region, cover, missing_text
from paramkit.sheets import Form, count_distinct, form_of, meetings, overlaps_itself

LIMITS = {
    "grid": {},
    "map": {"GRID_PLACES": 0},
    "windows of 5 bytes": {"GRID_PLACES": 0, "MAP_BYTES": 5},
    "windows of 40 bytes": {"GRID_PLACES": 0, "MAP_BYTES": 40},
    "few boxes": {"GRID_BOXES": 2, "MAP_BYTES": 200},
    "few digits": {"GRID_DIGITS": 2, "MAP_BYTES": 200},
}


def forget() -> None:
    """Empty the caches: results do not depend on the limits, but the way to them does."""
    for cached in (
        regions._whole,
        regions._measured,
        sheets._meetings,
        count_distinct,
        overlaps_itself,
    ):
        cached.cache_clear()


@pytest.fixture(params=LIMITS)
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every route to the result, each forced by small limits."""
    for name, value in LIMITS[request.param].items():
        monkeypatch.setattr(sheets, name, value)
    forget()
    yield request.param
    forget()


def walk(region: Region) -> list[tuple[tuple[int, ...], int]]:
    """(index, cell) of every element, in row-major order; of an expanded axis the first index alone."""
    once = [min(n, 1) if s == 0 else n for n, s in zip(region.sizes, region.strides)]
    return [
        (index, region.offset + sum(k * s for k, s in zip(index, region.strides)))
        for index in product(*(range(n) for n in once))
    ]


def brute_force(space: Region, views: Sequence[Region]) -> Coverage:
    """`cover` by the definition."""
    wanted = walk(space)
    touched = [[cell for _, cell in walk(view)] for view in views]
    union = {cell for cells in touched for cell in cells}
    missing = [index for index, cell in wanted if cell not in union]
    cells = {cell for _, cell in wanted}
    return Coverage(
        len(cells & union),
        brute_twice([set(t) for t in touched], [len(t) for t in touched]),
        len(cells - union),
        missing[0] if missing else None,
    )


def brute_twice(cells: list[set[int]], totals: list[int]) -> tuple[int, int] | None:
    for second, own in enumerate(cells):
        for first in range(second):
            if cells[first] & own:
                return first, second
        if len(own) < totals[second]:
            return second, second
    return None


def text_holds(space: Region, views: Sequence[Region], text: str) -> bool:
    """Whether a text of `missing_text` says exactly what is missing."""
    union = {cell for view in views for _, cell in walk(view)}
    missing = {cell for _, cell in walk(space) if cell not in union}
    if not missing:
        return text == ""
    first = brute_force(space, views).first_missing
    assert first is not None
    if "element" in text:
        many = "1 element" if len(missing) == 1 else f"{len(missing)} elements, the first"
        return text == f"{many} at {list(first)}" and not is_box(space, missing)
    index = np.zeros(space.sizes, bool)
    index[eval(f"np.s_{text}")] = True
    named = {
        space.offset + sum(int(k) * s for k, s in zip(at, space.strides))
        for at in np.argwhere(index)
    }
    return named == missing


def is_box(space: Region, missing: set[int]) -> bool:
    """Whether these cells, of a space without a repeated cell, are one box of its own dimensions."""
    every = walk(space)
    if len({cell for _, cell in every}) < len(every):
        return False
    at = [index for index, cell in every if cell in missing]
    lengths = [max(axis) - min(axis) + 1 for axis in zip(*at)]
    return prod(lengths) == len(at)


STRIDES = (0, 1, 1, 2, 2, 3, 4, 4, 6, 8, 12, 24)


@st.composite
def any_region(draw: st.DrawFn, most: int = 40) -> Region:
    sizes = tuple(draw(st.lists(st.integers(0, 5) | st.integers(1, 3), max_size=4)))
    strides = tuple(draw(st.sampled_from(STRIDES)) for _ in sizes)
    return Region(draw(st.integers(0, most)), sizes, strides)


@st.composite
def chain_region(draw: st.DrawFn) -> Region:
    """Strides that divide one another; loops may be longer than their digit, offsets begin anywhere."""
    sizes = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    strides = tuple(draw(st.permutations((1, 3, 6, 24)))[: len(sizes)])
    return Region(draw(st.integers(0, 60)), sizes, strides)


@st.composite
def slices(draw: st.DrawFn) -> tuple[Region, list[Region]]:
    """A tensor, dense or padded or permuted, and strided slices of it."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    order = draw(st.permutations(range(len(sizes))))
    strides, step = [0] * len(sizes), 1
    for axis in order:
        strides[axis] = step
        step *= sizes[axis] + draw(st.sampled_from((0, 0, 0, 1)))
    origin = draw(st.sampled_from((0, 0, 7)))
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        offset, own, steps = origin, [], []
        for n, s in zip(sizes, strides):
            begin = draw(st.integers(0, n - 1))
            end, by = draw(st.integers(begin, n)), draw(st.sampled_from((1, 1, 2, 3)))
            offset += begin * s
            own.append(len(range(begin, end, by)))
            steps.append(s * by)
        parts.append(Region(offset, tuple(own), tuple(steps)))
    return Region(origin, tuple(sizes), tuple(strides)), parts


some = settings(max_examples=100, deadline=None, derandomize=True)


# Not a fixture: Hypothesis would share one set-up among all its examples, which is what is wanted here.
@pytest.mark.usefixtures("limits")
class TestAgainstMarkingEveryCell:
    @some
    @given(any_region(), st.lists(any_region(), max_size=5))
    @example(Region(0, (2, 2), (0, 0)), [Region(0, (3,), (0,)), Region(0, (), ())])
    @example(Region(0, (4, 3), (2, 1)), [Region(0, (4, 3), (2, 1))])
    @example(Region(0, (0, 3), (3, 1)), [Region(0, (0, 3), (3, 1)), Region(5, (2,), (1,))])
    @example(Region(3, (3, 4), (2, 3)), [Region(1, (5,), (2,)), Region(0, (2, 3), (3, 2))])
    def test_any_strides(self, space: Region, views: list[Region]) -> None:
        assert cover(space, views) == brute_force(space, views)

    @some
    @given(chain_region(), st.lists(chain_region(), max_size=4))
    @example(Region(0, (7, 7), (3, 1)), [Region(2, (7, 7, 7), (24, 6, 1)), Region(50, (7,), (3,))])
    def test_carries(self, space: Region, views: list[Region]) -> None:
        assert cover(space, views) == brute_force(space, views)

    @some
    @given(slices())
    @example((Region(0, (2, 6), (6, 1)), [Region(0, (6,), (1,)), Region(0, (6,), (1,))]))
    @example((Region(0, (6, 2), (1, 6)), [Region(2, (3,), (1,))]))
    def test_slices_and_the_text(self, given: tuple[Region, list[Region]]) -> None:
        space, views = given
        assert cover(space, views) == brute_force(space, views)
        text = missing_text(space, views)
        assert text_holds(space, views, text), text

    @some
    @given(any_region(), st.lists(any_region(), max_size=3))
    def test_text_of_any_strides(self, space: Region, views: list[Region]) -> None:
        text = missing_text(space, views)
        overlapping = len({cell for _, cell in walk(space)}) < len(walk(space))
        assert text_holds(space, views, text) or (overlapping and "element" in text), text

    @some
    @given(st.lists(any_region(), max_size=5), st.lists(any_region(), max_size=3))
    def test_meetings(self, writers: list[Region], readers: list[Region]) -> None:
        forms = [form_of(r.sizes, r.strides) for r in (*writers, *readers)]
        live = [(r, f) for r, f in zip((*writers, *readers), forms, strict=True) if f is not None]
        placed = [(r.offset, f) for r, f in live]
        cells = [{cell for _, cell in walk(r)} for r, _ in live]
        split = sum(f is not None for f in forms[: len(writers)])
        expected = [
            next((j for j in range(min(k, split)) if cells[j] & cells[k]), None)
            for k in range(len(live))
        ]
        found = meetings(placed[:split], placed[split:])
        assert found == (expected[:split], expected[split:])
        for (region, form), own in zip(live, cells):
            assert count_distinct(form) == len(own)
            assert overlaps_itself(form) == (len(own) < len(walk(region)))
            assert form.total == len(walk(region))
            assert form.span == max(own) - min(own) + 1

    def test_random_slices_of_larger_tensors(self) -> None:
        """Seeded: up to a few thousand cells, with many regions that leave little or nothing out."""
        rng = np.random.default_rng(5)
        complete = 0
        for _ in range(60):
            rank = int(rng.integers(1, 4))
            sizes = tuple(int(n) for n in rng.integers(2, 13, rank))
            strides = tuple(int(np.prod(sizes[k + 1 :])) for k in range(rank))
            views = list(pieces_of(Region(0, sizes, strides), rng, int(rng.integers(1, 7))))
            space = Region(0, sizes, strides)
            rng.shuffle(views)  # type: ignore[arg-type]
            views = [Region(*v) for v in views]
            assert brute_force(space, views).missing == 0
            found = cover(space, views)
            assert found == Coverage(prod(sizes), None, 0, None)
            complete += len(views) > 1
            gone = views.pop(int(rng.integers(len(views))))
            assert cover(space, views) == brute_force(space, views)
            assert text_holds(space, views, missing_text(space, views))
            if views:
                views.append(views[0])
                assert cover(space, [*views, gone]) == brute_force(space, [*views, gone])
        assert complete > 40


def pieces_of(region: Region, rng: np.random.Generator, cuts: int) -> Iterator[Region]:
    """A partition of a region: cut along some axis at some place, or dealt out in turns."""
    axes = [k for k, n in enumerate(region.sizes) if n > 1]
    if cuts == 0 or not axes:
        yield region
        return
    axis = int(rng.choice(axes))
    n, s = region.sizes[axis], region.strides[axis]
    if rng.random() < 0.5:
        at = int(rng.integers(1, n))
        parts = [(0, at, s), (at * s, n - at, s)]
    else:
        turns = int(rng.integers(2, min(n, 4) + 1))
        parts = [(k * s, len(range(k, n, turns)), s * turns) for k in range(turns)]
    for offset, size, stride in parts:
        sizes, strides = list(region.sizes), list(region.strides)
        sizes[axis], strides[axis] = size, stride
        part = Region(region.offset + offset, tuple(sizes), tuple(strides))
        yield from pieces_of(part, rng, cuts - 1)


# ---- patterns of real layouts --------------------------------------------------------------------


def dense(*shape: int) -> Region:
    return Region(0, shape, tuple(prod(shape[k + 1 :]) for k in range(len(shape))))


def by_pattern(
    pattern: str, src: tuple[int, ...], dst: tuple[int, ...], at: dict[str, int | str], **sizes: int
) -> tuple[Region, Region]:
    """(source region, destination region) of a rule between dense tensors."""
    made, d, s, _ = compile_pattern(
        pattern, at, sizes, src, dense(*src).strides, dst, dense(*dst).strides
    )
    return Region(s.offset, tuple(made), tuple(s.strides)), Region(
        d.offset, tuple(made), tuple(d.strides)
    )


@pytest.mark.usefixtures("limits")
class TestPatterns:
    def test_left_twice_and_right_never(self) -> None:
        fused = dense(6, 8)
        left = by_pattern("o i -> o (s i)", (6, 4), (6, 8), {"s": 0})[1]
        right = by_pattern("o i -> o (s i)", (6, 4), (6, 8), {"s": 1})[1]
        assert cover(fused, [left, right]) == Coverage(48, None, 0, None)
        assert cover(fused, [left, left]) == Coverage(24, (0, 1), 24, (0, 4))
        assert missing_text(fused, [left, left]) == "[:, 4:8]"
        assert cover(fused, [right, left, right]) == Coverage(48, (0, 2), 0, None)

    def test_rows_twice_and_never(self) -> None:
        fused = dense(6, 8)
        top, bottom = (by_pattern("o i -> (s o) i", (3, 8), (6, 8), {"s": k})[1] for k in range(2))
        assert cover(fused, [top, bottom]) == Coverage(48, None, 0, None)
        assert cover(fused, [bottom, bottom]) == Coverage(24, (0, 1), 24, (0, 0))
        assert missing_text(fused, [bottom, bottom]) == "[0:3, :]"
        assert missing_text(fused, [top]) == "[3:6, :]"

    @pytest.mark.parametrize("g, r, d, e", [(2, 4, 3, 5), (3, 1, 2, 4), (1, 2, 4, 3), (4, 7, 2, 1)])
    def test_grouped_query_interleave(self, g: int, r: int, d: int, e: int) -> None:
        shape = (g * (r + 2) * d, e)
        query = by_pattern("(g r d) e -> (g s d) e", (g * r * d, e), shape, {"s": "0:r"}, g=g, d=d)
        key, value = (
            by_pattern("(g d) e -> (g s d) e", (g * d, e), shape, {"s": at}, g=g, d=d)
            for at in (r, r + 1)
        )
        space = dense(*shape)
        every = [query[1], key[1], value[1]]
        assert cover(space, every) == Coverage(prod(shape), None, 0, None)
        for k in range(3):
            rest = [view for j, view in enumerate(every) if j != k]
            assert cover(space, rest) == brute_force(space, rest)
            twice = [*rest, rest[0]]
            assert cover(space, twice) == brute_force(space, twice)
            assert cover(space, twice).twice == (0, 2)
        assert cover(dense(g * r * d, e), [query[0]]) == Coverage(g * r * d * e, None, 0, None)
        assert cover(dense(g * d, e), [key[0]]) == Coverage(g * d * e, None, 0, None)

    @pytest.mark.parametrize("h, d", [(4, 3), (1, 4), (5, 1)])
    def test_rotary_pairs(self, h: int, d: int) -> None:
        shape = (h * 2 * d, 3)
        source, whole = by_pattern("(h two d) e -> (h d two) e", shape, shape, {}, two=2, h=h)
        assert cover(dense(*shape), [whole]) == Coverage(prod(shape), None, 0, None)
        assert cover(dense(*shape), [source]) == Coverage(prod(shape), None, 0, None)
        halves = [
            by_pattern("(h d) e -> (h d two) e", (h * d, 3), shape, {"two": k}, h=h, two=2)[1]
            for k in range(2)
        ]
        assert cover(dense(*shape), halves) == Coverage(prod(shape), None, 0, None)
        for views in ([halves[1]], [halves[0], halves[0]], [whole, halves[1]]):
            assert cover(dense(*shape), views) == brute_force(dense(*shape), views)

    def test_stacked_experts(self) -> None:
        shape = (5, 4, 3)
        experts = [by_pattern("o i -> e o i", (4, 3), shape, {"e": k})[1] for k in range(5)]
        assert cover(dense(*shape), experts) == Coverage(60, None, 0, None)
        without = [*experts[:3], experts[4]]
        assert cover(dense(*shape), without) == Coverage(48, None, 12, (3, 0, 0))
        assert missing_text(dense(*shape), without) == "[3, :, :]"
        assert missing_text(dense(*shape), experts[:2]) == "[2:5, :, :]"

    def test_transposed_on_either_side(self) -> None:
        source, target = by_pattern("i o -> o i", (4, 6), (6, 4), {})
        assert cover(dense(6, 4), [target]) == Coverage(24, None, 0, None)
        assert cover(dense(4, 6), [source]) == Coverage(24, None, 0, None)
        flipped = Region(0, (6, 4), (1, 6))
        assert cover(flipped, [Region(0, (3, 6), (6, 1))]) == Coverage(18, None, 6, (0, 3))
        assert missing_text(flipped, [Region(0, (3, 6), (6, 1))]) == "[:, 3]"


# ---- what is said, and what is kept small --------------------------------------------------------


def test_results_of_few_regions() -> None:
    space = dense(4, 6)
    assert cover(space, [space]) == Coverage(24, None, 0, None)
    assert cover(space, [space, space]) == Coverage(24, (0, 1), 0, None)
    assert cover(space, []) == Coverage(0, None, 24, (0, 0))
    assert missing_text(space, []) == "[:, :]"
    assert missing_text(space, [space]) == ""
    assert missing_text(space, [Region(0, (23,), (1,))]) == "[3, 5]"
    assert missing_text(space, [Region(1, (22,), (1,))]) == "2 elements, the first at [0, 0]"
    assert missing_text(Region(0, (), ()), []) == "[...]"
    assert cover(Region(0, (), ()), []) == Coverage(0, None, 1, ())
    assert cover(dense(0, 3), []) == Coverage(0, None, 0, None)
    folded = Region(0, (3, 4), (2, 1))
    assert cover(folded, [folded]) == Coverage(8, (0, 0), 0, None)
    expanded = Region(0, (3, 4), (0, 1))
    assert cover(expanded, [expanded]) == Coverage(4, None, 0, None)
    assert missing_text(expanded, [Region(0, (2,), (1,))]) == "[:, 2:4]"


def test_arguments_that_are_no_regions() -> None:
    with pytest.raises(ValueError, match="below 0"):
        cover(dense(4), [Region(3, (4,), (-1,))])
    with pytest.raises(ValueError, match="zip"):
        cover(dense(4), [Region(0, (4,), (1, 1))])


def test_one_form_for_one_set_of_cells() -> None:
    """A split axis, an axis of one and a permuted order are the same cells."""
    expected = Form(6, ((4, 12),), 42, 24, 24, False)
    assert form_of((4, 6), (12, 1)) == expected
    assert form_of((2, 1, 6, 2), (24, 5, 1, 12)) == expected
    assert form_of((2, 3, 4), (1, 2, 12)) == expected
    assert form_of((4, 3), (6, 1), 2) == expected
    assert form_of((5, 4, 6), (0, 12, 1)) == expected._replace(folded=True)


def test_tera_elements_on_a_small_grid() -> None:
    """Neither time nor memory depends on the number of elements where strides divide one another."""
    rows, columns = 1 << 21, 1 << 20
    space = dense(rows, columns)
    dealt = [Region(k, (rows, columns // 256), (columns, 256)) for k in range(256)]
    tracemalloc.start()
    assert cover(space, dealt) == Coverage(rows * columns, None, 0, None)
    assert (
        missing_text(space, dealt[:-1])
        == f"{rows * columns // 256} elements, the first at [0, 255]"
    )
    assert cover(space, [*dealt, Region(5, (1,), (1,))]).twice == (5, 256)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_memory_of_windows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides that form no chain, over more elements than a window has places."""
    monkeypatch.setattr(sheets, "MAP_BYTES", 1 << 20)
    rows, columns = 3001, 1001  # 3 M elements, and 6 does not divide the row
    dealt = [Region(k, (rows, len(range(k, columns, 6))), (columns, 6)) for k in range(6)]
    forget()
    tracemalloc.start()
    found = cover(dense(rows, columns), dealt)
    partly = cover(dense(rows, columns), [*dealt[:4], dealt[5], dealt[2]])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == Coverage(rows * columns, None, 0, None)
    gone = rows * dealt[4].sizes[1]
    assert partly == Coverage(rows * columns - gone, (2, 5), gone, (0, 4))
    assert peak < 2 << 20


def test_results_are_kept_by_what_the_regions_are() -> None:
    """The same views at another address are the same result; a kept result is not another's."""
    forget()
    left, right = Region(0, (4, 3), (6, 1)), Region(3, (4, 3), (6, 1))
    at = [Region(100 + r.offset, r.sizes, r.strides) for r in (left, right)]
    home, away = Region(0, (4, 6), (6, 1)), Region(100, (4, 6), (6, 1))
    assert cover(home, [left, right]) == cover(away, at) == Coverage(24, None, 0, None)
    assert regions._measured.cache_info().hits == 1
    assert cover(home, at) == Coverage(0, None, 24, (0, 0))
    assert cover(home, [left, left]).twice == (0, 1)
