"""More than 2**31 elements, and no memory left: each skipped where the GPU has too little memory for it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import paramkit
from tests import cases
from tests.gpu.needs import need_gpu
from tests.gpu.storages import counted

need_gpu()

BIG = (1 << 31) + 4099
CHUNK = 1 << 28  # elements compared at once
GUARD = 7


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    """The memory of one test is free for the next."""
    yield
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def need(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < (gigabytes + 1) * 2**30:
        pytest.skip(f"needs {gigabytes + 1:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


def noise(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device).random_(0, 256)


def guards(*shape: int, device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.full(shape, GUARD, dtype=dtype, device=device)


def chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(CHUNK // max(width, 1), 1)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal numbers, compared a part at a time."""
    assert got.shape == want.shape
    width = got.numel() // len(got)
    for part in chunks(len(got), width):
        assert torch.equal(got[part], want[part].to(got.dtype)), (
            f"elements {part} of the first axis"
        )


def assert_all(got: Tensor, number: int) -> None:
    width = got.numel() // max(len(got), 1)
    for part in chunks(len(got), width):
        assert bool((got[part] == number).all()), f"elements {part} of the first axis"


# More than 2**31 elements.


def test_a_copy(cuda: torch.device) -> None:
    need(6)
    source, whole = noise(BIG + 64, cuda), guards(BIG + 128, device=cuda)
    for to, at in ((61, 3), (64, 0)):
        dst, src = whole[to : to + BIG], source[at : at + BIG]
        paramkit.copy_(dst, src)
        assert_same(dst, src)
        assert_all(whole[:to], GUARD)
        assert_all(whole[to + BIG :], GUARD)
        whole.fill_(GUARD)


def test_short_rows(cuda: torch.device) -> None:
    """Rows of 16 bytes that lie at any phase: more single bytes than 31 bits count."""
    rows = (1 << 27) + 5
    need(6)
    whole, source = guards(rows, 17, device=cuda), noise(rows * 16 + 3, cuda)[3:].view(rows, 16)
    paramkit.copy_(whole[:, 1:], source)
    assert_same(whole[:, 1:], source)
    assert_all(whole[:, 0], GUARD)


def test_long_rows(cuda: torch.device) -> None:
    rows, run = (1 << 20) + 1, 2079
    need(6)
    whole, source = guards(rows, 2100, device=cuda), noise(rows * run, cuda).view(rows, run)
    paramkit.copy_(whole[:, 5 : 5 + run], source)
    assert_same(whole[:, 5 : 5 + run], source)
    assert_all(whole[:, :5], GUARD)
    assert_all(whole[:, 5 + run :], GUARD)


def test_every_other_element(cuda: torch.device) -> None:
    need(10)
    whole, source = guards(2 * BIG, device=cuda), noise(2 * BIG, cuda)
    paramkit.copy_(whole[::2], source[1::2])
    assert_same(whole[::2], source[1::2])
    assert_all(whole[1::2], GUARD)


@pytest.mark.parametrize(
    ("shape", "dims"), [((65_537, 32_771), (1, 0)), ((5, 20_000, 21_500), (0, 2, 1))]
)
def test_a_transpose(cuda: torch.device, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    need(6)
    count = torch.Size(shape).numel()
    source = noise(count, cuda).view(shape).permute(dims)
    whole = guards(count + 130, device=cuda)
    got = whole[65 : 65 + count].view(source.shape)
    paramkit.copy_(got, source)
    assert_same(got, source)
    assert_all(whole[:65], GUARD)
    assert_all(whole[65 + count :], GUARD)


def test_a_cast(cuda: torch.device) -> None:
    need(9)
    source, whole = noise(BIG, cuda), guards(BIG + 9, device=cuda, dtype=torch.float16)
    paramkit.copy_(whole[3 : 3 + BIG], source)
    assert_same(whole[3 : 3 + BIG], source)
    assert_all(whole[:3], GUARD)
    assert_all(whole[3 + BIG :], GUARD)


def test_a_cast_of_rows(cuda: torch.device) -> None:
    rows, run = (1 << 21) + 3, 1031
    need(9)
    source = noise(rows * run, cuda).view(rows, run)
    whole = guards(rows, run + 2, device=cuda, dtype=torch.bfloat16)
    paramkit.copy_(whole[:, 1:-1], source)
    assert_same(whole[:, 1:-1], source)
    assert_all(whole[:, 0], GUARD)
    assert_all(whole[:, -1], GUARD)


def test_fills(cuda: torch.device) -> None:
    """A run, and columns; with a number and with an element on the device."""
    need(6)
    rows = (1 << 30) + 7
    whole = guards(rows, 4, device=cuda)
    for value in (5, torch.tensor(6, dtype=torch.uint8, device=cuda)):
        for view in (whole[:, 1:], whole.view(-1)[13 : 13 + BIG]):
            whole.fill_(GUARD)
            paramkit.fill_(view, value)
            assert_all(view, int(value))
            written = view.numel() * int(value)
            left = (whole.numel() - view.numel()) * GUARD
            assert int(whole.sum(dtype=torch.int64)) == written + left


def test_far_into_a_storage(cuda: torch.device) -> None:
    """A small view whose offsets are beyond 2**31 elements."""
    need(3)
    length = BIG + 5000
    whole = torch.zeros(length, dtype=torch.uint8, device=cuda)
    view = whole.as_strided((10, 10), (7, 100), length - 2000)
    numbers = torch.arange(100, dtype=torch.uint8, device=cuda).view(10, 10)
    paramkit.copy_(view, numbers)
    assert torch.equal(view, numbers)
    assert int(whole.sum(dtype=torch.int64)) == sum(range(100))


def test_a_list_and_a_plan_of_large_tensors(cuda: torch.device) -> None:
    """With small ones between: whatever is cut is cut in one launch."""
    need(16)
    flat, matrix = noise(BIG, cuda), noise(65_537 * 32_771, cuda).view(65_537, 32_771)
    srcs = [flat, torch.rand(9, device=cuda), matrix.t(), flat[:1000], flat]
    dsts = [
        torch.zeros(BIG, dtype=torch.uint8, device=cuda),
        torch.zeros(9, device=cuda),
        torch.zeros(32_771, 65_537, dtype=torch.uint8, device=cuda),
        torch.zeros(1000, device=cuda),
        torch.zeros(BIG, dtype=torch.float16, device=cuda),
    ]
    assert counted(lambda: paramkit.foreach_copy_(dsts, srcs))["launches"] == 1
    plan = paramkit.plan(dsts, srcs)
    for again in (False, True):
        for dst, src in zip(dsts, srcs, strict=True):
            assert_same(dst, src)
            dst.zero_()
        if not again:
            plan.apply()


def test_there_and_back(cuda: torch.device) -> None:
    """From pageable memory of the host, through many slots, and back."""
    need(6)
    source = cases.tiled((BIG,), torch.uint8, period=65_519)
    there, back = guards(BIG + 2, device=cuda), torch.zeros(BIG, dtype=torch.uint8)
    counts = counted(lambda: paramkit.copy_(there[1:-1], source))
    assert counts["staged_bytes"] == BIG
    assert_same(there[1:-1], source.to(cuda))
    assert (there[0].item(), there[-1].item()) == (GUARD, GUARD)
    paramkit.copy_(back, there[1:-1])
    assert torch.equal(back, source)


# No memory left.


@contextmanager
def no_memory_left(device: torch.device) -> Iterator[None]:
    """Whatever asks for memory of the device is told that there is none."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6, device)
    held: list[Tensor] = []
    try:
        for size in (32 << 20, 2 << 20, 1 << 20, 64 << 10, 512):
            with pytest.raises(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device=device))
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        held.clear()


def lists(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Longer than what travels with a launch."""
    return [*torch.zeros(3000, 70, device=device)[:, 1:].unbind()], [
        *torch.rand(3000, 69, device=device).unbind()
    ]


def test_short_lists_and_replays_need_none(cuda: torch.device) -> None:
    dsts, srcs = lists(cuda)
    a, b = torch.zeros(9, 8, device=cuda), torch.rand(8, 9, device=cuda)
    plan = paramkit.plan(dsts, srcs)
    with no_memory_left(cuda):
        paramkit.foreach_copy_([a], [b.t()])
        plan.apply()
    assert torch.equal(a, b.t())
    assert torch.equal(torch.stack(dsts), torch.stack(srcs))


def attempts(
    cuda: torch.device,
) -> dict[str, tuple[Callable[[], object], list[Tensor], list[Tensor]]]:
    """Calls that need memory of the device: (call, its destinations, its sources)."""
    dsts, srcs = lists(cuda)
    host, there = torch.rand(1000, 2000), torch.rand(1000, 2000, device=cuda)
    to, back = torch.zeros(2000, 1000, device=cuda), torch.zeros(2000, 1000)
    plan = paramkit.plan([to], [host.t()])
    return {
        "an upload": (lambda: paramkit.foreach_copy_(dsts, srcs), dsts, srcs),
        "to the GPU": (lambda: paramkit.copy_(to, host.t()), [to], [host.t()]),
        "to the host": (lambda: paramkit.copy_(back, there.t()), [back], [there.t()]),
        "a planned transfer": (plan.apply, [to], [host.t()]),
    }


@pytest.mark.parametrize("name", ["an upload", "to the GPU", "to the host", "a planned transfer"])
def test_a_call_without_memory(cuda: torch.device, name: str) -> None:
    """It says so, and works once there is some: nothing is left locked or broken."""
    call, dsts, srcs = attempts(cuda)[name]
    for _ in range(2):
        with no_memory_left(cuda), pytest.raises(torch.OutOfMemoryError):
            call()
        assert not any(dst.any() for dst in dsts)
    call()
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst.cpu(), src.cpu())


def test_a_plan_without_memory(cuda: torch.device) -> None:
    """Neither a new one nor a new source for one; the plan that there is goes on."""
    dsts, srcs = lists(cuda)
    others = [src + 1 for src in srcs]
    plan = paramkit.plan(dsts, srcs)
    with no_memory_left(cuda):
        with pytest.raises(RuntimeError, match="out of memory"):
            paramkit.plan(dsts, others)
        with pytest.raises(RuntimeError, match="out of memory"):
            plan.apply(others)
    plan.apply()
    held = plan._compiled.sources()
    assert torch.equal(torch.stack(dsts), torch.stack(held))
    plan.apply(others)
    assert torch.equal(torch.stack(dsts), torch.stack(others))
