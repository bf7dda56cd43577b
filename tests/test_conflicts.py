"""Which writes meet: against marking every byte, and what plans do about it."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, sheets
from paramkit.conflicts import Conflict, find_conflicts
from paramkit.destinations import Destination
from paramkit.resolve import Resolved, Write
from tests.guards import (
    Layout,
    assert_same_bits,
    assert_same_storage,
    nothing_written,
    place,
    storage_bytes,
    watch,
)

DTYPES = (torch.uint8, torch.int16, torch.float32, torch.complex64)
LENGTH = 96  # bytes of the storage that the views lie in


class View(NamedTuple):
    """Sizes, strides and offset in elements of `DTYPES[dtype]`; `apart`: in a storage of its own."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: int
    apart: bool = False

    def width(self) -> int:
        return torch.empty(0, dtype=DTYPES[self.dtype]).element_size()

    def elements(self) -> list[int]:
        """The place of each element, in logical order."""
        places = [self.offset]
        for size, stride in zip(self.sizes, self.strides, strict=True):
            places = [p + k * stride for p in places for k in range(size)]
        return places

    def bytes(self) -> set[tuple[bool, int]]:
        width = self.width()
        return {(self.apart, p * width + k) for p in self.elements() for k in range(width)}

    def fits(self) -> bool:
        return not self.elements() or (max(self.elements()) + 1) * self.width() <= LENGTH


@st.composite
def views(draw: st.DrawFn, sizes: tuple[int, ...] | None = None) -> View:
    if sizes is None:
        sizes = tuple(draw(st.lists(st.integers(0, 4) | st.integers(1, 3), max_size=3)))
    strides = tuple(draw(st.sampled_from((0, 1, 1, 2, 3, 4, 6, 8, 12))) for _ in sizes)
    apart = draw(st.sampled_from((False, False, True)))
    return View(sizes, strides, draw(st.integers(0, 20)), draw(st.integers(0, 3)), apart)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[View, View]:
    """A destination in the shared storage, and a source there, elsewhere, or the very same view."""
    dst = draw(views())._replace(apart=False)
    if draw(st.integers(0, 5)) == 0:
        return dst, dst
    return dst, draw(views(dst.sizes))


lists_of_writes = st.lists(
    pairs().filter(lambda pair: pair[0].fits() and pair[1].fits()), min_size=1, max_size=6
)


def resolved(writes: list[tuple[View, View]], raw: Tensor, other: Tensor) -> Resolved:
    """The writes as a front-end would make them: offsets relative to whole storages."""
    result = Resolved()
    for i, (dst, src) in enumerate(writes):
        result.destinations.append(
            Destination(f"d{i}", raw.view(DTYPES[dst.dtype]), None, f"d{i}", "tensor")
        )
        result.source_names.append(f"s{i}")
        result.source_tensors.append((other if src.apart else raw).view(DTYPES[src.dtype]))
        result.writes.append(
            Write(i, i, dst.sizes, dst.strides, dst.offset, src.strides, src.offset)
        )
    return result


def in_place(dst: View, src: View) -> bool:
    """Whether a write copies each element onto itself."""
    moved = [
        n for n, d, s in zip(dst.sizes, dst.strides, src.strides, strict=True) if n > 1 and d != s
    ]
    same_start = (dst.offset, dst.dtype, False) == (src.offset, src.dtype, src.apart)
    return same_start and not moved


def brute_force(writes: list[tuple[View, View]]) -> list[Conflict]:
    """`find_conflicts` by the definition, byte by byte."""
    found = []
    written = [dst.bytes() for dst, _ in writes]
    for i, (dst, src) in enumerate(writes):
        met = [j for j in range(i) if written[j] & written[i]]
        if met:
            found.append(Conflict("write", met[0], i))
        elif len(set(dst.elements())) < len(dst.elements()):
            found.append(Conflict("write", i, i))
        if in_place(dst, src):
            continue
        read = [j for j in range(len(writes)) if written[j] & src.bytes()]
        if read:
            found.append(Conflict("read", read[0], i))
    return sorted(found, key=lambda c: (c.second, c.first, c.kind))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(lists_of_writes)
@example([(View((2, 2), (1, 1), 0, 0), View((2, 2), (0, 0), 0, 0, True))])
@example([(View((3,), (2,), 0, 1), View((3,), (2,), 0, 1)), (View((3,), (2,), 1, 1),) * 2])
@example([(View((4,), (1,), 0, 2),) * 2, (View((1,), (1,), 15, 0), View((1,), (1,), 17, 0))])
def test_as_marking_every_byte(writes: list[tuple[View, View]]) -> None:
    raw, other = torch.zeros(LENGTH, dtype=torch.uint8), torch.zeros(LENGTH, dtype=torch.uint8)
    assert find_conflicts(resolved(writes, raw, other)) == brute_force(writes)
    assert not bool(raw.any())  # addresses alone are looked at


@pytest.mark.parametrize("places, room", [(0, 1 << 20), (0, 7), (0, 60)])
@pytest.mark.usefixtures("no_kept_results")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(lists_of_writes)
@example([(View((3, 2), (2, 3), 0, 0), View((3, 2), (0, 1), 4, 0, True))])
def test_as_marking_every_byte_without_a_grid(
    places: int, room: int, writes: list[tuple[View, View]]
) -> None:
    """The same on a map, and in windows of a few bytes."""
    raw, other = torch.zeros(LENGTH, dtype=torch.uint8), torch.zeros(LENGTH, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheets, "GRID_PLACES", places)
        patch.setattr(sheets, "MAP_BYTES", room)
        assert find_conflicts(resolved(writes, raw, other)) == brute_force(writes)


@pytest.fixture
def no_kept_results() -> Iterator[None]:
    """Results do not depend on the limits, but the way to them does."""
    kept = (sheets._meetings, sheets.count_distinct, sheets.overlaps_itself)
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


def one_write(i: int, shape: tuple[int, ...], offset: int = 0) -> Write:
    """Write i of a dense source into a part of destination i."""
    strides = torch.empty(shape, device="meta").stride()
    return Write(i, i, shape, strides, offset, strides, 0)


def with_tensors(dsts: list[Tensor], srcs: list[Any], writes: list[Write]) -> Resolved:
    result = Resolved(source_names=[f"s{i}" for i in range(len(srcs))], writes=writes)
    result.source_tensors.extend(srcs)
    for i, dst in enumerate(dsts):
        result.destinations.append(Destination(f"d{i}", dst, None, f"d{i}", "tensor"))
    return result


def test_sources_that_are_not_in_memory() -> None:
    """Their reads are left out; what is written from them is not."""
    base = torch.zeros(12)
    dsts, shape = [base[:8], base[4:]], (8,)
    writes = [one_write(0, shape), one_write(1, shape)]
    assert find_conflicts(with_tensors(dsts, [object(), object()], writes)) == [
        Conflict("write", 0, 1)
    ]
    assert find_conflicts(
        with_tensors(
            [base[:4], base[8:]], [object(), base[:4]], [one_write(0, (4,)), one_write(1, (4,))]
        )
    ) == [Conflict("read", 0, 1)]


def test_destinations_without_memory_yet() -> None:
    """Meta tensors of different storages are apart, those of one lie as they will."""
    base, other = torch.zeros(12, device="meta"), torch.zeros(12, device="meta")
    sources = [torch.ones(8) for _ in range(4)]
    writes = [one_write(i, (4,)) for i in range(4)]
    assert (
        find_conflicts(
            with_tensors([base[:4], other[:4], base[4:8], torch.zeros(4)], sources, writes)
        )
        == []
    )
    writes = [one_write(i, (8,)) for i in range(3)]
    assert find_conflicts(with_tensors([base[:8], other[2:10], base[4:]], sources, writes)) == [
        Conflict("write", 0, 2)
    ]


def test_many_columns_of_many_tensors_in_one_storage() -> None:
    """Interleaved halves of 300 tensors that lie side by side, two of which are written twice."""
    flat = torch.zeros(300 * 12)
    dsts = [flat[k * 12 : k * 12 + 12].view(3, 4) for k in range(300)]
    source = torch.ones(3, 2)
    writes = [
        Write(k, 0, (3, 2), (4, 1), 2 * side, (2, 1), 0) for k in range(300) for side in range(2)
    ]
    assert find_conflicts(with_tensors(dsts, [source], writes)) == []
    writes[41] = writes[40]  # the left half of tensor 20 twice, the right one never
    writes.append(Write(299, 0, (1,), (1,), 11, (1,), 0))
    assert find_conflicts(with_tensors(dsts, [source], writes)) == [
        Conflict("write", 40, 41),
        Conflict("write", 599, 600),
    ]


def tensor_at(view: View, raw: Tensor) -> Tensor:
    return raw.view(DTYPES[view.dtype]).as_strided(view.sizes, view.strides, view.offset)


@pytest.mark.usefixtures("backend")
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(lists_of_writes, st.integers(0, 1 << 20))
def test_a_list_plan_is_the_loop_or_an_error(writes: list[tuple[View, View]], seed: int) -> None:
    """Of one dtype, since arbitrary bits have no defined casts."""
    one = [(d._replace(dtype=1), s._replace(dtype=1)) for d, s in writes]
    one = [pair for pair in one if pair[0].fits() and pair[1].fits()]
    # Those have a test of their own: test_in_place_with_an_axis_of_one.
    assume(not any(in_place(d, s) and 1 in d.sizes for d, s in one))
    generator = torch.Generator().manual_seed(seed)
    raw, other = (
        torch.randint(256, (LENGTH,), dtype=torch.uint8, generator=generator) for _ in range(2)
    )
    before = raw.clone()
    dsts = [tensor_at(d, raw) for d, _ in one]
    srcs = [tensor_at(s, other if s.apart else raw) for _, s in one]
    expanded = any(
        d.elements() and any(n > 1 and s == 0 for n, s in zip(d.sizes, d.strides)) for d, _ in one
    )
    if brute_force(one) or expanded:
        with pytest.raises(PlanError):
            paramkit.plan(dsts, srcs)
        assert torch.equal(raw, before)
        return
    try:
        plan = paramkit.plan(dsts, srcs)
    except PlanError as error:  # an empty destination with stride 0 may be refused as expanded
        assert all(f.kind == "expanded" for f in error.findings)
        return
    plan.apply()
    twin = before.clone()
    for d, s in one:
        values = tensor_at(s, other if s.apart else before)
        tensor_at(d, twin).copy_(values.clone())
    assert torch.equal(raw, twin)
    assert plan.verify() == []


# overlap="last" is the sequence of assignments.


class Mixed(nn.Module):
    """Parameters of several dtypes, guarded; two of them overlap in one storage."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"a": (4, 6), "b": (5,), "c": (2, 3, 4)}
        kinds = {"a": torch.float32, "b": torch.bfloat16, "c": torch.int32}
        for name, shape in shapes.items():
            tensor = place(Layout.dense(shape), kinds[name])
            self.register_buffer(name, tensor)
        shared = place(Layout.dense((40,)), torch.float32)
        self.register_buffer("low", shared[:24].view(4, 6))
        self.register_buffer("high", shared[12:36].view(6, 4).t())


def random_index(rng: random.Random, shape: torch.Size) -> tuple[object, ...]:
    index: list[object] = []
    for size in shape[: rng.randint(0, len(shape))]:
        if rng.random() < 0.3:
            index.append(rng.randrange(size))
            continue
        start = rng.randrange(size)
        index.append(slice(start, rng.randint(start, size), rng.choice((1, 1, 2, 3))))
    if rng.random() < 0.2:
        index.append(...)
    return tuple(index)


def random_value(rng: random.Random, view: Tensor) -> Tensor | float:
    if rng.random() < 0.3:
        return rng.choice((0.5, -3, 7, True))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int8))
    shape = [n if rng.random() < 0.8 else 1 for n in view.shape]
    return torch.tensor(
        [rng.randint(-100, 100) for _ in range(torch.Size(shape).numel())], dtype=dtype
    ).reshape(shape)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("seed", range(40))
def test_overlap_last_is_the_sequence_of_assignments(seed: int) -> None:
    rng = random.Random(seed)
    ours, theirs = Mixed(), Mixed()
    writes = []
    for _ in range(rng.randint(1, 12)):
        name = rng.choice(("a", "b", "c", "low", "high"))
        tensor = ours.get_buffer(name)
        index = random_index(rng, tensor.shape)
        writes.append((name, index, random_value(rng, tensor[index])))
    seen = watch(*ours.buffers())
    with paramkit.writes(ours, overlap="last") as w:
        for name, index, value in writes:
            w[name][index] = value
    for name, index, value in writes:
        theirs.get_buffer(name)[index] = value
    for got, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_same_storage(got, expected)
    seen.assert_only_inside()
    for tensor in ours.buffers():
        tensor.fill_(9)
    for tensor in theirs.buffers():
        tensor.fill_(9)
    assert w.plan is not None
    w.plan.apply()  # and in the same order again
    for name, index, value in writes:
        theirs.get_buffer(name)[index] = value
    for got, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_same_storage(got, expected)


@pytest.mark.usefixtures("backend")
def test_overlap_last_with_large_and_mixed_writes() -> None:
    """Large enough for several threads: the order must hold all the same."""
    layer = nn.Linear(1000, 700)
    twin = nn.Linear(1000, 700)
    values = [torch.rand(700, 1000), torch.rand(700, 1000).double(), torch.rand(1000, 700).t()]
    with paramkit.writes(layer, overlap="last") as w:
        for value in values:
            w["weight"][...] = value
        w["weight"][100:600, 3::7] = 0.25
        w["weight"][::2] = values[1][::2]
        w["bias"][...] = 0.0
    with torch.no_grad():
        for value in values:
            twin.weight[...] = value
        twin.weight[100:600, 3::7] = 0.25
        twin.weight[::2] = values[1][::2]
    assert_same_bits(layer.weight.detach(), twin.weight.detach())
    assert not bool(layer.bias.any())


@pytest.mark.usefixtures("backend")
def test_overlap_last_still_refuses_reads_and_folded_destinations() -> None:
    layer = nn.Linear(4, 4)
    with (
        nothing_written(layer.weight),
        pytest.raises(PlanError, match="reads memory"),
        paramkit.writes(layer, overlap="last") as w,
    ):
        w["weight"][0] = 1.0
        w["weight"][1] = layer.weight.detach()[0]
    table = {"w": torch.zeros(8).as_strided((3, 3), (2, 1))}
    with (
        nothing_written(table["w"]),
        pytest.raises(PlanError, match="overlaps itself"),
        paramkit.writes(table, overlap="last") as w,
    ):
        w["w"][...] = 1.0


# Plans that meet are refused, with both writes named.


@pytest.mark.usefixtures("backend")
def test_list_plans_that_meet() -> None:
    base = place(Layout.dense((6, 6)), torch.float32)
    two, row = torch.ones(2, 6), torch.ones(6)
    cases: list[tuple[list[Tensor], list[Tensor], str]] = [
        ([base[:2], base[1:3]], [two, two], r"dsts\[0\].*dsts\[1\]"),
        ([base[2], base[:, 2]], [row, row], r"dsts\[0\].*dsts\[1\]"),
        ([base, base], [row, row], r"dsts\[0\].*dsts\[1\]"),
        ([base[0], base[1]], [base[1], row], "reads memory"),
        ([base[0], base[1]], [base[1], base[0]], "reads memory"),
        ([base[:2]], [base[1:3]], "reads memory"),
        ([base], [base.t()], "reads memory"),
        ([base], [base[0]], "reads memory"),
        ([base.as_strided((3, 3), (2, 1), 70)], [torch.ones(3, 3)], "overlaps itself"),
    ]
    for dsts, srcs, text in cases:
        with nothing_written(base), pytest.raises(PlanError, match=text) as caught:
            paramkit.plan(dsts, srcs)
        assert {f.kind for f in caught.value.findings} == {"conflict"}


@pytest.mark.usefixtures("backend")
def test_list_plans_that_only_look_as_if() -> None:
    base = place(Layout.dense((6, 6)), torch.float32)
    seen = watch(base)
    expected = base.clone()
    row = torch.rand(6)
    paramkit.plan(
        [base[0], base[1:3], base[4, ::2], base[4, 1::2], base[3:4]],
        [row, base[1:3], row[:3], row[3:], base[5]],
    ).apply()
    expected[0], expected[4, ::2], expected[4, 1::2] = row, row[:3], row[3:]
    expected[3] = expected[5]
    assert_same_bits(base, expected)
    seen.assert_only_inside()


@pytest.mark.usefixtures("backend")
def test_in_place_with_an_axis_of_one() -> None:
    """A tensor onto itself is no conflict, whatever the strides of its axes of one."""
    base = torch.rand(3, 1)
    expected = base.clone()
    paramkit.plan([base], [base]).apply()
    assert_same_bits(base, expected)


@pytest.mark.usefixtures("backend")
def test_parameters_that_share_a_storage() -> None:
    flat = torch.zeros(20)
    model = nn.Module()
    model.a = nn.Parameter(flat[:12].view(3, 4))
    model.b = nn.Parameter(flat[8:].view(3, 4))
    values = {"a": torch.ones(3, 4), "b": torch.ones(3, 4)}
    with nothing_written(flat), pytest.raises(PlanError) as caught:
        paramkit.plan(model, values)
    text = str(caught.value)
    assert "a <- a" in text
    assert "b <- b" in text


# Large views.


def test_large_interleaved_views_are_no_conflict() -> None:
    """Sixty-four million elements, written column by column: judged by their pattern."""
    big = torch.empty(8000, 8000)
    dsts = [big[:, k::250] for k in range(250)]
    start = time.perf_counter()
    plan = paramkit.plan(dsts, 0.0)
    assert time.perf_counter() - start < 20
    assert "250 writes" in plan.explain()
    with pytest.raises(PlanError, match=r"dsts\[7\].*dsts\[250\]"):
        paramkit.plan([*dsts, big[7999:, 7:8]], 0.0)
    assert storage_bytes(big).numel() == 256_000_000


def test_memory_for_views_that_need_a_map_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides of which none divides another, over far more elements than a window has places."""
    monkeypatch.setattr(sheets, "MAP_BYTES", 1 << 20)
    big = torch.empty(4001, 4001, dtype=torch.uint8)
    writes = [
        Write(0, 0, (4001, len(range(k, 4001, 7))), (4001, 7), k, (0, 0), 0) for k in range(7)
    ]
    plan = with_tensors([big], [torch.ones((), dtype=torch.uint8)], writes)
    tracemalloc.start()
    assert find_conflicts(plan) == []
    writes.append(Write(0, 0, (2,), (3,), 4000 * 4001, (0,), 0))
    assert find_conflicts(plan) == [Conflict("write", 0, 7)]
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_every_conflict_of_many_is_found_quickly() -> None:
    layer = nn.Linear(1500, 1, bias=False)
    start = time.perf_counter()
    with pytest.raises(PlanError) as caught, paramkit.writes(layer) as w:
        for i in (*range(1500), *range(1500)):
            w["weight"][0, i] = 1.0
    assert len(caught.value.findings) == 1500
    assert len(str(caught.value).splitlines()) < 70
    assert time.perf_counter() - start < 20
