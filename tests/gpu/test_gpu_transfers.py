"""Between host and GPU: any dtype and strides, pageable and pinned, blocking or not, in slots of any size."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import paramkit
from tests.cases import DTYPES, random_bits, values
from tests.gpu.needs import need_gpu
from tests.gpu.storages import assert_same_storage, counted, place, raw, small_numbers, twin
from tests.gpu.streams import delay
from tests.guards import Layout, random_layout, random_shape, random_source
from tests.test_casts import every_value

need_gpu()

HOST = torch.device("cpu")
WAYS = ("to the GPU", "to the host")


def sides(way: str, cuda: torch.device) -> tuple[torch.device, torch.device]:
    """Where the destination is, and the source."""
    return (cuda, HOST) if way == "to the GPU" else (HOST, cuda)


@contextmanager
def staging(total: int) -> Iterator[None]:
    """Slots of a third of this many bytes each."""
    extension = paramkit.backend.active()
    before = extension.set_staging_bytes(total)
    try:
        yield
    finally:
        extension.set_staging_bytes(before)


def assert_transfers(dsts: list[Tensor], srcs: list[Tensor], what: str) -> dict[str, int]:
    """One list copied by us is what the loop of torch's copies gives; returns the counts."""
    want = [twin(dst) for dst in dsts]
    for dst, src in zip(want, srcs, strict=True):
        dst.copy_(src)
    counts = counted(lambda: paramkit.foreach_copy_(dsts, srcs))
    for index, (ours, theirs, src) in enumerate(zip(dsts, want, srcs, strict=True)):
        label = f"{what}: pair {index}, {src.dtype} -> {ours.dtype}, {tuple(ours.shape)}"
        assert_same_storage(ours, theirs, label, any_nan=ours.dtype != src.dtype)
    return counts


# What is copied.


def pinned(tensor: Tensor) -> Tensor:
    """The same view of pinned memory."""
    memory = raw(tensor).pin_memory()
    empty = torch.empty(0, dtype=tensor.dtype)
    view = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return empty.set_(memory.untyped_storage(), *view)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(8))
def test_random_views(cuda: torch.device, way: str, seed: int) -> None:
    """Every dtype, any strides on both sides, broadcasts, empties, casts, memory of both kinds."""
    rng = random.Random(seed)
    to, at = sides(way, cuda)
    dsts, srcs = [], []
    for index in range(100):
        shape = random_shape(rng)
        dtype = rng.choice(DTYPES)
        casts = not dtype.is_complex and rng.random() < 0.4
        src_dtype = rng.choice([d for d in DTYPES if not d.is_complex]) if casts else dtype
        dst = place(random_layout(rng, shape), dtype, to)
        src = place(random_source(rng, shape), src_dtype, at, index)
        if src_dtype != dtype:
            small_numbers(src)
        if rng.random() < 0.3:
            dst, src = (dst, pinned(src)) if to.type == "cuda" else (pinned(dst), src)
        dsts.append(dst)
        srcs.append(src)
    counts = assert_transfers(dsts, srcs, f"seed {seed}")
    assert counts["staged_bytes"] > 0
    for index, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):  # one by one
        want = twin(dst)
        want.copy_(src)
        raw(dst).copy_(raw(want))  # the pattern around it
        dst.zero_()
        paramkit.copy_(dst, src)
        assert_same_storage(
            dst, want, f"seed {seed}, {index} alone", any_nan=dst.dtype != src.dtype
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("src", DTYPES[:-3], ids=str)
def test_every_value_of_every_cast(cuda: torch.device, way: str, src: torch.dtype) -> None:
    """What torch gives on the host or on the GPU: either may convert, and out of range they differ."""
    to, at = sides(way, cuda)
    source = every_value(src).flatten()
    for dst in DTYPES[:-3]:
        if dst == src:
            continue
        got = torch.zeros(source.shape, dtype=torch.float32, device=to).to(dst)
        paramkit.foreach_copy_([got], [source.to(at)])
        by_host = torch.empty(source.shape, dtype=dst).copy_(source)
        by_gpu = torch.empty(source.shape, dtype=dst, device=cuda).copy_(source.to(cuda))
        good = _same(got.cpu(), by_host) | _same(got.cpu(), by_gpu.cpu())
        if src.is_floating_point and not dst.is_floating_point:
            # The host's vector and scalar conversions differ as well.
            wide = source.to(torch.float64)
            low, high = _range(dst)
            good |= ~((wide > low) & (wide < high))
        wrong = (~good).nonzero().flatten()
        assert len(wrong) == 0, (
            f"{src} -> {dst}: {len(wrong)} differ, first {source[wrong[0]].item()!r}: "
            f"{got[wrong[0]].item()!r}, not {by_host[wrong[0]].item()!r}"
        )


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors ``[n]`` have the same bits, or both are NaN."""
    equal = (a.view(torch.uint8).view(len(a), -1) == b.view(torch.uint8).view(len(b), -1)).all(1)
    if a.is_floating_point():
        equal |= a.to(torch.float64).isnan() & b.to(torch.float64).isnan()
    return equal


def _range(dtype: torch.dtype) -> tuple[float, float]:
    if dtype == torch.bool:
        return -float("inf"), float("inf")
    limits = torch.iinfo(dtype)
    return limits.min - 1.0, limits.max + 1.0


LAYOUTS = {
    "permuted": ((200, 300), (1, 200), (300, 1)),
    "both permuted": ((70, 300), (1, 75), (1, 70)),
    "rows": ((90, 130), (140, 1), (133, 1)),
    "every other": ((90, 130), (400, 2), (390, 3)),
    "deep": ((6, 20, 9, 31), (1, 6, 120, 1080), (5580, 31, 620, 1)),
    "a row again and again": ((90, 130), (130, 1), (0, 1)),
    "a column again and again": ((90, 130), (130, 1), (1, 0)),
    "one element": ((90, 130), (130, 1), (0, 0)),
    "windows": ((90, 130), (131, 1), (1, 1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slots", [None, 3 * 4096, 3 * 40_000])
def test_layouts(cuda: torch.device, way: str, slots: int | None) -> None:
    """Casts to narrower and wider dtypes; slots that hold all of it, a few rows, and less than one."""
    to, at = sides(way, cuda)
    f32, bf16, f8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
    names, dsts, srcs = [], [], []
    for name, (shape, to_strides, at_strides) in LAYOUTS.items():
        for dst, src in (
            (f32, f32),
            (bf16, f32),
            (f32, bf16),
            (f8, torch.float16),
            (torch.int64, torch.uint8),
        ):
            dsts.append(place(Layout.dense(shape, to_strides), dst, to))
            srcs.append(small_numbers(place(Layout.dense(shape, at_strides), src, at)))
            names.append(name)
    with staging(3 * (32 << 20) if slots is None else slots):
        assert_transfers(dsts, srcs, f"slots of {slots}")
        for name, dst, src in zip(names, dsts, srcs, strict=True):
            assert_transfers([dst], [src], f"{name}, slots of {slots}")


# What travels.


@pytest.mark.parametrize("way", WAYS)
def test_the_narrower_dtype_travels(cuda: torch.device, way: str) -> None:
    to, at = sides(way, cuda)
    for dst, src in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float64, torch.float64),
        (torch.uint8, torch.int64),
    ):
        source = values((300, 501), src).to(at)
        got = torch.zeros(501, 300, device=to).to(dst)
        counts = counted(lambda got=got, source=source: paramkit.copy_(got, source.t()))
        assert counts["staged_bytes"] == 300 * 501 * min(dst.itemsize, src.itemsize)
        assert counts["launches"] == 1
        assert torch.equal(got.float().cpu(), source.t().float().cpu())


def test_what_repeats_travels_once(cuda: torch.device) -> None:
    got = torch.zeros(1000, 70, device=cuda)
    row = torch.rand(70)
    assert counted(lambda: paramkit.foreach_copy_([got], [row]))["staged_bytes"] == 280
    assert torch.equal(got, row.to(cuda).expand(1000, 70))


@pytest.mark.parametrize("way", WAYS)
def test_larger_than_all_slots(cuda: torch.device, way: str) -> None:
    """Odd sizes through slots of 64 KiB, the ring many times around."""
    to, at = sides(way, cuda)
    dsts, srcs, expected = [], [], 0
    for shape, dims, dst, src in (
        ((1_500_007,), (0,), torch.float32, torch.float32),
        ((1_500_007,), (0,), torch.bfloat16, torch.float32),
        ((1023, 701), (1, 0), torch.float32, torch.bfloat16),
        ((3, 200_003), (1, 0), torch.float32, torch.float32),
        ((200_003, 3), (1, 0), torch.uint8, torch.float32),
        ((50, 30, 70, 11), (3, 1, 0, 2), torch.float64, torch.float32),
    ):
        source = values(shape, src, 3).to(at).permute(dims)
        dsts.append(place(Layout.dense(tuple(source.shape)), dst, to))
        srcs.append(source)
        expected += source.numel() * min(dst.itemsize, src.itemsize)
    with staging(3 * 65_536):
        counts = assert_transfers(dsts, srcs, way)
        assert expected <= counts["staged_bytes"] < expected * 1.01
        plan = paramkit.plan(dsts, srcs)
        for dst in dsts:
            dst.zero_()
        plan.apply()
        assert plan.verify() == []


@pytest.mark.parametrize("way", WAYS)
def test_twenty_thousand_small_tensors(cuda: torch.device, way: str) -> None:
    to, at = sides(way, cuda)
    count = 20_000
    memory = torch.rand(count, 40, device=at)
    srcs = [row[: 1 + i % 40] for i, row in enumerate(memory.unbind())]
    got = torch.zeros(count, 40, device=to)
    dsts = [row[: 1 + i % 40] for i, row in enumerate(got.unbind())]
    counts = counted(lambda: paramkit.foreach_copy_(dsts, srcs))
    assert counts["launches"] <= 2
    lengths = 1 + torch.arange(count) % 40
    mask = torch.arange(40)[None] < lengths[:, None]
    assert torch.equal(got.cpu(), torch.where(mask, memory.cpu(), torch.zeros(())))


def test_what_takes_the_direct_way(cuda: torch.device) -> None:
    """A small tensor by itself, and large ones that are pinned and dense: torch's own copy."""
    small, there = torch.rand(100), torch.zeros(100, device=cuda)
    large, big = torch.rand(1 << 20).pin_memory(), torch.zeros(1 << 20, device=cuda)
    for dst, src in ((there, small), (small, there), (big, large), (large, big)):
        with paramkit.backend.trace() as trace:
            paramkit.copy_(dst, src)
        assert trace.routes == {"native": 1}
        assert torch.equal(dst.cpu(), src.cpu())
    with paramkit.backend.trace() as trace:
        paramkit.foreach_copy_([there, big], [small, large])
    assert trace.routes == {"staged": 1, "native": 1}
    with paramkit.backend.trace() as trace:
        paramkit.copy_(big, torch.rand(1 << 20))
    assert trace.routes == {"staged": 1}


# Order.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slots", [None, 3 * 4096])
def test_overlapping_destinations_keep_their_order(
    cuda: torch.device, way: str, slots: int | None
) -> None:
    to, at = sides(way, cuda)
    rng = random.Random(2)
    starts = [rng.randrange(30_000) for _ in range(200)]
    lengths = [rng.randint(1, 5000) for _ in range(200)]
    got, want = torch.zeros(36_000, device=to), torch.zeros(36_000)
    srcs = [torch.full((n,), float(i + 1)) for i, n in enumerate(lengths)]
    for start, src in zip(starts, srcs, strict=True):
        want[start : start + len(src)] = src
    dsts = [got[a : a + n] for a, n in zip(starts, lengths, strict=True)]
    with staging(3 * (32 << 20) if slots is None else slots):
        paramkit.foreach_copy_(dsts, [src.to(at) for src in srcs])
    assert torch.equal(got.cpu(), want)


def test_windows_of_the_host(cuda: torch.device) -> None:
    """A destination that holds one element several times: torch's own order, whatever that is."""
    got, source = torch.zeros(12).as_strided((4, 6), (2, 1)), torch.rand(4, 6, device=cuda)
    want = twin(got)
    want.copy_(source)
    paramkit.foreach_copy_([got], [source])
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_source_may_change_after_the_call(
    cuda: torch.device, size: int, non_blocking: bool, dtype: torch.dtype
) -> None:
    """Pageable, behind a busy stream: what was there when the call was made arrives."""
    source, dst = torch.rand(2, size), torch.zeros(size, 2, dtype=dtype, device=cuda)
    want = source.t().to(cuda, dtype).clone()
    torch.cuda.synchronize()
    delay(20)
    paramkit.foreach_copy_([dst], [source.t()], non_blocking=non_blocking)
    source.fill_(-1)
    torch.cuda.synchronize()
    assert torch.equal(dst, want)


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_what_a_blocking_call_wrote_is_there(cuda: torch.device, size: int) -> None:
    """For other streams too, which have not been told to wait."""
    source, dst = torch.rand(size), torch.zeros(size, 1, device=cuda)[:, 0]
    want, side = source.to(cuda).clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    delay(20)
    paramkit.foreach_copy_([dst], [source])
    with torch.cuda.stream(side):
        seen = dst.clone()
    side.synchronize()
    assert torch.equal(seen, want)


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_the_host_has_it_when_the_call_returns(
    cuda: torch.device, size: int, non_blocking: bool
) -> None:
    """What the current stream computes before it included."""
    side = torch.cuda.Stream()
    source, dst = torch.zeros(2, size, device=cuda), torch.zeros(size, 2, dtype=torch.float64)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        delay(20)
        source.fill_(3)
        paramkit.foreach_copy_([dst], [source.t()], non_blocking=non_blocking)
        assert bool((dst == 3).all())
        source.fill_(4)  # behind what was read
    torch.cuda.synchronize()
    assert bool((dst == 3).all())


def test_non_blocking_calls_without_a_pause(cuda: torch.device) -> None:
    """The ring is filled again and again while the stream is busy: no slot is used too early."""
    source, got = torch.zeros(20, 500), torch.zeros(30, 20, 500, device=cuda)
    with staging(3 * 8192):
        torch.cuda.synchronize()
        delay(30)
        for turn in range(30):
            source.fill_(turn + 1)
            paramkit.foreach_copy_([*got[turn].unbind()], [*source.unbind()], non_blocking=True)
    for turn in range(30):
        assert bool((got[turn] == turn + 1).all()), f"turn {turn}"


def test_slots_change_their_size_while_they_are_in_use(cuda: torch.device) -> None:
    source, want = torch.rand(60, 700), []
    got = torch.zeros(60, 700, device=cuda)
    for turn, total in enumerate((3 * 4096, 3 << 20, 3 * 8192, 12_345, 96 << 20, 0)):
        with staging(total):
            delay(5)
            source.add_(1)
            paramkit.foreach_copy_([got], [source], non_blocking=True)
            want.append((turn, got.clone(), source.clone()))
    for turn, ours, theirs in want:
        assert torch.equal(ours.cpu(), theirs), f"turn {turn}"


def test_two_streams_by_turns(cuda: torch.device) -> None:
    """The ring serves both; a slot of one is not taken before its stream has read it."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    sources = [torch.zeros(50_000) for _ in streams]
    got = [torch.zeros(40, 50_000, device=cuda) for _ in streams]
    torch.cuda.synchronize()
    with staging(3 * 65_536):
        for turn in range(40):
            for stream, source, memory in zip(streams, sources, got, strict=True):
                with torch.cuda.stream(stream):
                    if turn % 10 == 0:
                        delay(3)
                    source.fill_(turn + 1)
                    paramkit.foreach_copy_([memory[turn]], [source], non_blocking=True)
    torch.cuda.synchronize()
    for memory in got:
        assert torch.equal(memory[:, 7].cpu(), torch.arange(1.0, 41.0))
        assert torch.equal(memory.amin(1), memory.amax(1))


# Threads.


def test_threads_transfer_at_once(cuda: torch.device) -> None:
    """Both ways, on streams of their own, beside kernels, plans and work that needs the GIL."""
    wrong: list[str] = []

    def guarded(name: str, work: object, *args: object) -> threading.Thread:
        def run() -> None:
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    work(*args)  # type: ignore[operator]
            except BaseException as error:
                wrong.append(f"{name}: {error!r}")

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def there_and_back(number: int) -> None:
        rng = random.Random(number)
        for turn in range(15):
            shapes = [(rng.randint(1, 300), rng.randint(1, 300)) for _ in range(40)]
            srcs = [torch.full(shape, float(number * 100 + turn)) for shape in shapes]
            there = [torch.zeros(shape[::-1], device=cuda) for shape in shapes]
            back = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
            paramkit.foreach_copy_(there, [src.t() for src in srcs], non_blocking=turn % 2 == 0)
            paramkit.foreach_copy_(back, [dst.t() for dst in there])
            for index, (ours, theirs) in enumerate(zip(back, srcs, strict=True)):
                assert torch.equal(ours, theirs.double()), f"turn {turn}, pair {index}"

    def with_a_plan() -> None:
        srcs = [torch.zeros(100, 100) for _ in range(30)]
        dsts = [torch.zeros(100, 100, dtype=torch.bfloat16, device=cuda) for _ in range(30)]
        plan = paramkit.plan(dsts, srcs)
        for turn in range(20):
            for src in srcs:
                src.fill_(turn)
            plan.apply()
            assert all(bool((dst == turn).all()) for dst in dsts), f"replay {turn}"

    def on_the_device() -> None:
        dsts = [torch.zeros(64, device=cuda) for _ in range(500)]
        for turn in range(50):
            paramkit.foreach_copy_(dsts, [torch.full((64,), float(turn), device=cuda)] * 500)
            assert bool((torch.stack(dsts) == turn).all()), f"turn {turn}"

    with staging(3 * 32_768):
        threads = [guarded(f"transfers {n}", there_and_back, n) for n in range(3)]
        threads += [guarded("plan", with_a_plan), guarded("kernels", on_the_device)]
        for thread in threads:
            thread.join(90)
    assert not [thread.name for thread in threads if thread.is_alive()], "threads hang"
    assert not wrong


# Bits that any way has to keep.


@pytest.mark.parametrize("way", WAYS)
def test_random_bits_arrive(cuda: torch.device, way: str) -> None:
    """Every NaN payload, in every dtype, also through strides."""
    to, at = sides(way, cuda)
    dsts, srcs = [], []
    for dtype in DTYPES:
        for strided in (False, True):
            source = random_bits((70, 50), dtype, 5).to(at)
            srcs.append(source.t() if strided else source)
            dsts.append(place(Layout.dense(tuple(srcs[-1].shape)), dtype, to))
    assert_transfers(dsts, srcs, way)
