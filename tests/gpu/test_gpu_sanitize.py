"""A little of everything, for compute-sanitizer: storages end where their views do, nothing else runs on the GPU.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 a byte read or written outside is one that nobody owns. What is
expected is worked out on the host, so that the sanitizer has no kernels of torch's to look at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import paramkit
from tests import guards
from tests.gpu.storages import moved, on_host, small_numbers
from tests.guards import Layout, contiguous_strides

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
CASTS = (
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float8_e4m3fn),
    (torch.float64, torch.float16),
    (torch.int64, torch.uint8),
    (torch.bool, torch.int64),
)
Pair = tuple[Tensor, Tensor]


def exact(
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype,
    first: int = 0,
    seed: int | None = None,
) -> Tensor:
    """A view on the host that begins at element `first` of its storage and ends with it."""
    strides = contiguous_strides(shape) if strides is None else strides
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return guards.place(Layout(shape, strides, first, first + reach), dtype, seed)


def numbers(
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype,
    first: int = 0,
) -> Tensor:
    return small_numbers(exact(shape, strides, dtype=dtype, first=first, seed=1))


def expected(dst: Tensor, src: Tensor) -> Tensor:
    want = moved(dst, "cpu")
    want.copy_(src)
    return want


def check(pairs: list[Pair], device: torch.device) -> None:
    """One list on the device, then every pair of it alone: as torch on the host."""
    check_list(pairs, device, paramkit.foreach_copy_)
    for index, (dst, src) in enumerate(pairs):
        got = moved(dst, device)
        paramkit.copy_(got, moved(src, device))
        guards.assert_same_storage(on_host(got), expected(dst, src), f"pair {index} alone")


def check_list(
    pairs: list[Pair], device: torch.device, write: Callable[[list[Tensor], list[Tensor]], object]
) -> None:
    dsts, srcs = [[moved(pair[side], device) for pair in pairs] for side in (0, 1)]
    write(dsts, srcs)
    for index, (got, (dst, src)) in enumerate(zip(dsts, pairs, strict=True)):
        guards.assert_same_storage(on_host(got), expected(dst, src), f"pair {index}")


def copies() -> list[Pair]:
    lengths, phases = (1, 15, 16, 17, 33, 4095, 4100, 70_001), ((0, 0), (1, 0), (0, 3), (5, 2))
    return [
        (exact((n,), dtype=torch.uint8, first=to), exact((n,), dtype=torch.uint8, first=at, seed=n))
        for n, (to, at) in itertools.product(lengths, phases)
    ]


def rows() -> list[Pair]:
    shapes = ((9, 5), (7, 16), (5, 513), (3, 8200))
    return [
        (
            exact((n, run), (run + 3, 1), dtype=torch.uint8, first=1),
            exact((n, run), (run + gap, 1), dtype=torch.uint8, seed=run),
        )
        for (n, run), gap in itertools.product(shapes, (0, 1))
    ]


def moves() -> list[Pair]:
    pairs = []
    for dtype in WIDTHS.values():
        pairs += [
            (exact((300,), (3,), dtype=dtype), exact((300,), (2,), dtype=dtype, first=1, seed=2)),
            (exact((20, 30), dtype=dtype), exact((20, 30), (0, 1), dtype=dtype, seed=3)),
            (exact((20, 30), dtype=dtype), exact((20, 30), (1, 0), dtype=dtype, seed=4)),
            (exact((5, 6, 7), (1, 5, 31), dtype=dtype), exact((5, 6, 7), dtype=dtype, seed=5)),
        ]
    return pairs


def tiles() -> list[Pair]:
    pairs = []
    for dtype in WIDTHS.values():
        for (a, b), gap in itertools.product(((65, 130), (129, 33), (40, 40)), (0, 1)):
            source = exact((b, a), (a + gap, 1), dtype=dtype, first=gap, seed=6).t()
            pairs.append((exact((a, b), (b + gap, 1), dtype=dtype), source))
        deep = exact((3, 40, 9, 5), dtype=dtype, seed=7).permute(2, 3, 0, 1)
        pairs.append((exact(tuple(deep.shape), dtype=dtype), deep))
    return pairs


def casts() -> list[Pair]:
    pairs = []
    for dst, src in CASTS:
        for n, to, at in ((1, 0, 0), (37, 0, 0), (37, 1, 3), (5003, 3, 3)):
            pairs.append((exact((n,), dtype=dst, first=to), numbers((n,), dtype=src, first=at)))
        pairs += [
            (exact((9, 21), (23, 1), dtype=dst), numbers((9, 21), dtype=src)),
            (exact((50,), (3,), dtype=dst), numbers((50,), (2,), dtype=src)),
            (exact((67, 131), dtype=dst), numbers((131, 67), dtype=src).t()),
            (exact((67, 131), (132, 1), dtype=dst), numbers((131, 67), (68, 1), dtype=src).t()),
            (exact((300,), dtype=dst, first=1), numbers((), dtype=src)),
        ]
    return pairs


def test_sanitize_copies(device: torch.device) -> None:
    check(copies(), device)


def test_sanitize_rows(device: torch.device) -> None:
    check(rows(), device)


def test_sanitize_moves(device: torch.device) -> None:
    check(moves(), device)


def test_sanitize_tiles(device: torch.device) -> None:
    check(tiles(), device)


def test_sanitize_casts(device: torch.device) -> None:
    check(casts(), device)


@pytest.mark.parametrize("width", WIDTHS)
def test_sanitize_fills(device: torch.device, width: int) -> None:
    dtype = WIDTHS[width]
    shapes = [
        *(((n,), None, first) for n in (1, 7, 16, 37, 5001) for first in (0, 1)),
        ((20, 5), (7, 1), 1),
        ((300,), (3,), 0),
    ]
    value = exact((), dtype=dtype, seed=8)
    there = [moved(exact(a, b, dtype=dtype, first=c), device) for a, b, c in shapes]
    for values in (value.item(), moved(value, device)):
        wants = [exact(a, b, dtype=dtype, first=c).fill_(value) for a, b, c in shapes]
        paramkit.foreach_fill_(there, values)
        for index, (got, want) in enumerate(zip(there, wants, strict=True)):
            guards.assert_same_storage(on_host(got), want, f"fill {index}")


def test_sanitize_long_lists(device: torch.device) -> None:
    """Descriptors that are uploaded, of every family; and a plan, whose own stay on the device."""
    pairs = [*copies(), *rows(), *moves(), *tiles(), *casts()]
    check_list(pairs * 2, device, paramkit.foreach_copy_)
    check_list(pairs, device, lambda dsts, srcs: paramkit.plan(dsts, srcs).apply())


def test_sanitize_transfers(cuda: torch.device) -> None:
    """To the GPU and back, in small slots, with casts on either side."""
    host = [pair for make in (rows, moves, tiles, casts) for pair in make()]
    extension = paramkit.backend.active()
    extension.set_staging_bytes(3 * 8192)
    for to, at in ((cuda, "cpu"), ("cpu", cuda)):
        dsts = [moved(dst, to) for dst, _ in host]
        paramkit.foreach_copy_(dsts, [moved(src, at) for _, src in host])
        for index, (got, (dst, src)) in enumerate(zip(dsts, host, strict=True)):
            guards.assert_same_storage(on_host(got), expected(dst, src), f"pair {index} to {to}")
