"""Views cut into boxes by parts: every element once, and where torch says that it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paramkit import PlanError, Rule
from paramkit.boxes import Box, Geometry, Side, boxes, clip, elements, halved, pieces_within, placed
from paramkit.localize import localize
from paramkit.resolve import resolve
from paramkit.sources.lazy import contiguous_strides
from paramkit.sources.spread import Segment, Spread, SpreadPart, whole_axes

FEW = settings(max_examples=100, deadline=None, derandomize=True)
MANY = settings(max_examples=200, deadline=None, derandomize=True)
Axes = tuple[tuple[Segment, ...], ...]
Pairs = Counter[tuple[int, int]]

# ---- what is drawn -------------------------------------------------------------------------------


@st.composite
def shapes(draw: Any, empty: bool = True) -> tuple[int, ...]:
    """Up to four axes of a few elements, of one, and now and then of none."""
    sizes = st.sampled_from((1, 2, 3, 4, 5, 6, 7) + ((0,) if empty else ()))
    return tuple(draw(st.lists(sizes, max_size=4)))


@st.composite
def strided(draw: Any, room: int, rank: int | None = None) -> tuple[Any, Any, int]:
    """Sizes, strides and offset of any view that stays in `room` elements, aligned to nothing."""
    offset = draw(st.integers(0, max(0, room - 1)))
    left, sizes, strides = room - 1 - offset, [], []
    for _ in range(draw(st.integers(0, 4)) if rank is None else rank):
        n = draw(st.integers(0 if room == 0 else 1, 5))
        stride = draw(st.integers(0, max(0, left // max(1, n - 1))))
        left -= max(0, n - 1) * stride
        sizes.append(n)
        strides.append(stride)
    if room == 0 and 0 not in sizes:
        sizes, strides = [*sizes, 0], [*strides, 1]
    return tuple(sizes), tuple(strides), offset


def turned(draw: Any, view: Tensor) -> Tensor:
    """A view as patterns and slices make it: split, cut, stepped, turned, expanded."""
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(("split", "cut", "step", "turn", "one", "expand")))
        if kind == "turn":
            view = view.permute(draw(st.permutations(range(view.dim()))))
            continue
        if kind == "one":
            view = view.unsqueeze(draw(st.integers(0, view.dim())))
            continue
        if not view.dim():
            continue
        axis = draw(st.integers(0, view.dim() - 1))
        n = view.shape[axis]
        if kind == "split" and n > 1 and view.dim() < 6:
            inner = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
            view = view.unflatten(axis, (n // inner, inner))
        elif kind == "cut" and n:
            start = draw(st.integers(0, n - 1))
            view = view.narrow(axis, start, draw(st.integers(0, n - start)))
        elif kind == "step" and n:
            view = view[(slice(None),) * axis + (slice(None, None, draw(st.integers(1, 3))),)]
        elif kind == "expand" and n == 1:
            shape = list(view.shape)
            shape[axis] = draw(st.integers(1, 3))
            view = view.expand(shape)
    return view


@st.composite
def views(draw: Any, shape: Sequence[int]) -> tuple[Any, Any, int]:
    """Sizes, strides and offset in a contiguous tensor of this shape."""
    if draw(st.booleans()):
        return draw(strided(prod(shape)))
    view = turned(draw, torch.empty(tuple(shape)))
    return tuple(view.shape), view.stride(), view.storage_offset()


@st.composite
def partitions(draw: Any, shape: Sequence[int]) -> list[Axes]:
    """Parts that hold every index together once: uneven, empty, and in runs that are not in order."""
    cut = []
    for n in shape:
        parts = draw(st.integers(1, 3))
        owners = draw(st.lists(st.integers(0, parts - 1), min_size=n, max_size=n))
        runs: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
        for i, owner in enumerate(owners):
            last = runs[owner][-1:]
            if last and sum(last[0]) == i:
                runs[owner][-1] = (last[0][0], last[0][1] + 1)
            else:
                runs[owner].append((i, 1))
        chosen = []
        for own in runs:
            at = 0
            placed_at = {}
            for run in draw(st.permutations(own)):
                placed_at[run] = at
                at += run[1]
            chosen.append(tuple(Segment(s, k, placed_at[s, k]) for s, k in own))
        cut.append(chosen)
    return [tuple(axes) for axes in product(*cut)]


@st.composite
def two_views(draw: Any) -> tuple[Geometry, Any, Any]:
    """Views of equal sizes of two tensors, and the shapes of these: None, now and then."""
    first = draw(shapes(empty=False))
    sizes, strides, offset = draw(views(first))
    # The other tensor has room for loops of the same sizes, with other strides.
    order = draw(st.permutations(range(len(sizes))))
    other, step = [0] * len(sizes), 1
    for k in order:
        other[k] = step
        step *= max(1, sizes[k]) + draw(st.integers(0, 2))
    start = draw(st.integers(0, 3))
    room = start + step
    shape: Any = (room,)
    if draw(st.booleans()):
        row = draw(st.integers(1, 7))
        shape = (-(-room // row), row)
    geometry = (sizes, strides, offset, tuple(other), start)
    if draw(st.booleans()):
        return geometry, first, draw(st.sampled_from((shape, None)))
    flipped = (sizes, tuple(other), start, strides, offset)
    return flipped, draw(st.sampled_from((shape, None))), first


# ---- what they are held against ------------------------------------------------------------------


def addresses(sizes: Sequence[int], strides: Sequence[int], offset: int) -> list[int]:
    """Of every element in logical order, by torch's own strides."""
    if 0 in sizes:
        return []
    reach = offset + sum((n - 1) * s for n, s in zip(sizes, strides)) + 1
    found: list[int] = torch.arange(reach).as_strided(sizes, strides, offset).flatten().tolist()
    return found


def pairs(geometry: Geometry) -> Pairs:
    sizes, strides_a, offset_a, strides_b, offset_b = geometry
    return Counter(
        zip(addresses(sizes, strides_a, offset_a), addresses(sizes, strides_b, offset_b))
    )


def reached(box: Box, side: Side, shape: Sequence[int] | None) -> list[int]:
    """Addresses in a contiguous tensor; every index must be one of its axis."""
    shape = (1 << 40,) if shape is None else shape or (1,)
    assert len(side.base) == len(shape)
    top = list(side.base)
    for n, axis, step in zip(box.sizes, side.axes, side.steps, strict=True):
        assert n > 0 and step >= 0
        if n > 1 and step:
            top[axis] += (n - 1) * step
    assert all(low >= 0 and high < n for low, high, n in zip(side.base, top, shape)), (side, shape)
    return addresses(box.sizes, *placed(side, contiguous_strides(shape)))


def pairs_of(found: Iterable[Box], first: Any, second: Any) -> Pairs:
    seen: Pairs = Counter()
    for box in found:
        seen.update(zip(reached(box, box.first, first), reached(box, box.second, second)))
    return seen


def globally(axes: Axes, shape: Sequence[int]) -> Tensor:
    """For each element of a part, in row-major order of its own, its address in the whole."""
    whole = torch.arange(prod(shape)).view(tuple(shape))
    for axis, segments in enumerate(axes):
        order = sorted(segments, key=lambda s: s.at)
        index = [i for s in order for i in range(s.start, s.start + s.length)]
        whole = whole.index_select(axis, torch.tensor(index, dtype=torch.int64))
    return whole.flatten()


def spread(whole: Tensor, parts: Sequence[Axes], missing: Sequence[int] = ()) -> Spread:
    """A tensor in parts, each in memory of its own with a stride of its own."""
    held: list[SpreadPart] = []
    for number, axes in enumerate(parts):
        shape = SpreadPart(axes, None).shape
        local = whole.flatten()[globally(axes, whole.shape)].view(shape)
        if number % 2 and local.dim():
            local = local.transpose(0, -1).contiguous().transpose(0, -1)
        held.append(SpreadPart(axes, None if number in missing else local))
    return Spread(tuple(whole.shape), whole.dtype, held)


# ---- boxes and clip ------------------------------------------------------------------------------


@MANY
@given(two_views())
def test_boxes_have_every_pair_once(case: tuple[Geometry, Any, Any]) -> None:
    geometry, first, second = case
    assert pairs_of(boxes(geometry, first, second), first, second) == pairs(geometry)


@MANY
@given(two_views(), st.data())
def test_parts_have_every_pair_once(case: tuple[Geometry, Any, Any], data: Any) -> None:
    geometry, first, second = case
    cut_second = data.draw(st.booleans()) if first and second else second is not None
    shape = second if cut_second else first
    if shape is None:
        return
    seen: Pairs = Counter()
    for axes in data.draw(partitions(shape)):
        own = SpreadPart(axes, None).shape
        place = globally(axes, shape).tolist()
        for box in boxes(geometry, first, second):
            for piece in clip(box, cut_second, axes):
                sides = (own if not cut_second else first, own if cut_second else second)
                a, b = reached(piece, piece.first, sides[0]), reached(piece, piece.second, sides[1])
                if cut_second:
                    b = [place[k] for k in b]
                else:
                    a = [place[k] for k in a]
                seen.update(zip(a, b))
    assert seen == pairs(geometry)


@FEW
@given(two_views(), st.integers(1, 9))
def test_halves_are_small_and_all(case: tuple[Geometry, Any, Any], limit: int) -> None:
    geometry, first, second = case
    found = [b for box in boxes(geometry, first, second) for b in halved(box, limit)]
    assert all(0 < elements(box) <= limit for box in found)
    assert pairs_of(found, first, second) == pairs(geometry)


def test_of_what_is_aligned_there_is_one_box() -> None:
    """One task for the kernels, and not one for each row."""
    matrix = (whole_axes((6, 8))[0], (Segment(2, 4, 0),))
    (box,) = boxes(((6, 8), (8, 1), 0, (8, 1), 0), (6, 8), None)
    (piece,) = clip(box, False, matrix)
    assert piece.sizes == (6, 4) and placed(piece.second, (1,)) == ((8, 1), 2)
    # "(g r d) e -> (g s d) e": 3 groups of 2 heads of 4 rows, of which a shard has rows 5 to 19.
    geometry = ((3, 2, 4, 5), (40, 20, 5, 1), 0, (100, 20, 5, 1), 0)
    (box,) = boxes(geometry, (24, 5), None)
    shard = ((Segment(5, 14, 0),), (Segment(0, 5, 0),))
    found = [piece.sizes for piece in clip(box, False, shard)]
    # The rest of a head, a group of two whole heads, the beginning of one; a loop of one turn is no loop.
    assert found == [(1, 1, 3, 5), (1, 2, 4, 5), (1, 1, 3, 5)]


def test_a_loop_over_many_rows_is_cut_once() -> None:
    """A view that runs on from row to row: its beginning, all whole rows together, its end."""
    found = list(boxes(((100,), (1,), 3, (1,), 0), (20, 7), None))
    assert [box.sizes for box in found] == [(4,), (13, 7), (5,)]


# ---- views of tensors in parts -------------------------------------------------------------------


@MANY
@given(shapes(), st.data())
def test_a_view_of_a_tensor_in_parts(shape: tuple[int, ...], data: Any) -> None:
    sizes, strides, offset = data.draw(views(shape))
    parts = data.draw(partitions(shape))
    whole = torch.arange(prod(shape)).view(shape)
    expected = whole.as_strided(sizes, strides, offset) if 0 not in sizes else torch.empty(sizes)
    assert torch.equal(spread(whole, parts).read_view(sizes, strides, offset), expected)


@FEW
@given(shapes(), st.data())
def test_what_is_held_elsewhere_is_left_out(shape: tuple[int, ...], data: Any) -> None:
    sizes, strides, offset = data.draw(views(shape))
    parts = data.draw(partitions(shape))
    missing = data.draw(st.sets(st.integers(0, len(parts) - 1)))
    tensor = spread(torch.arange(prod(shape)).view(shape), parts, tuple(missing))
    gone = {int(k) for m in missing for k in globally(parts[m], shape)}
    expected = torch.tensor(addresses(sizes, strides, offset), dtype=torch.int64)
    got = torch.full((prod(sizes),), -1)
    for (piece_sizes, own, start, held, at), local in pieces_within(tensor, sizes, strides, offset):
        into = got.as_strided(piece_sizes, own, start)
        assert (into == -1).all()
        into.copy_(local.as_strided(piece_sizes, held, local.storage_offset() + at))
    wanted = [-1 if k in gone else k for k in expected.tolist()]
    assert got.tolist() == wanted
    if -1 in wanted:
        with pytest.raises(RuntimeError, match="held elsewhere"):
            tensor.read_view(sizes, strides, offset)


@FEW
@given(shapes(empty=False), st.data())
def test_bytes_of_a_tensor_in_parts(shape: tuple[int, ...], data: Any) -> None:
    whole = torch.arange(prod(shape), dtype=torch.int32).view(shape)
    tensor = spread(whole, data.draw(partitions(shape)))
    begin = data.draw(st.integers(0, whole.nbytes))
    end = data.draw(st.integers(begin, whole.nbytes))
    out = torch.zeros(end - begin, dtype=torch.uint8)
    tensor.read_into(begin, end, out)
    assert torch.equal(out, whole.flatten().view(torch.uint8)[begin:end])


# ---- writes from parts into parts ----------------------------------------------------------------


@FEW
@given(shapes(empty=False), st.data())
def test_each_part_is_written_from_parts(shape: tuple[int, ...], data: Any) -> None:
    """As the ranks of a group do it, one after the other, through names, with a turned source."""
    turn = data.draw(st.permutations(range(len(shape))))
    back = [turn.index(k) for k in range(len(shape))]
    whole = torch.arange(1, prod(shape) + 1).view(shape)
    source = spread(
        whole.permute(turn).contiguous(), data.draw(partitions([shape[k] for k in turn]))
    )
    letters = "abcd"[: len(shape)]
    rules = []
    if len(shape):
        pattern = f"{' '.join(letters[k] for k in turn)} -> {' '.join(letters)}"
        rules = [Rule("w", "w", pattern)]
    assert torch.equal(source.load().permute(back), whole)
    for axes in data.draw(partitions(shape)):
        local = torch.zeros(SpreadPart(axes, None).shape, dtype=torch.int64)
        model = {"w": Spread(shape, torch.int64, [SpreadPart(axes, local)])}
        made = localize(resolve(model, {"w": source}, rules))
        for w in made.writes:
            held = made.source_tensors[w.src]
            into = local.as_strided(w.sizes, w.dst_strides, w.dst_offset)
            assert (into == 0).all()
            into.copy_(
                held.as_strided(w.sizes, w.src_strides, held.storage_offset() + w.src_offset)
            )
        assert local.flatten().tolist() == whole.flatten()[globally(axes, shape)].tolist()


def test_a_part_that_is_missing_is_an_error() -> None:
    whole = torch.arange(12).view(4, 3)
    halves: list[Axes] = [(((Segment(2 * k, 2, 0),)), (Segment(0, 3, 0),)) for k in range(2)]
    source = spread(whole, halves, missing=(1,))
    local = torch.zeros(2, 3, dtype=torch.int64)
    for axes, fine in zip(halves, (True, False)):
        model: Any = {"w": Spread((4, 3), torch.int64, [SpreadPart(axes, local)])}
        resolved = resolve(model, {"w": source})
        if fine:
            assert len(localize(resolved).writes) == 1
            continue
        with pytest.raises(PlanError, match="another rank holds") as caught:
            localize(resolved)
        assert "paramkit.distributed.plan" in str(caught.value)
