"""The kernels at every length, phase and element size, with and without stores that bypass the cache."""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor

import paramkit
from tests.cases import DTYPES, random_bits
from tests.guards import (
    assert_same_storage,
    bits,
    place,
    random_layout,
    random_shape,
    random_source,
    watch,
)

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
NEAR = (511, 512, 513, 1023, 2047, 2048, 2049, 4097, 16383, 16384, 16385, 65535, 65537, 70000)


def raw(length: int, seed: int) -> Tensor:
    return random_bits((length,), torch.uint8, seed)


@pytest.mark.parametrize("streams", (False, True))
@pytest.mark.parametrize("width", WIDTHS)
def test_copies_and_fills_of_every_length(
    backend: str, width: int, streams: bool, stream_stores
) -> None:
    """0 to two vectors byte by byte, then near every threshold; the destination at any phase."""
    dtype = WIDTHS[width]
    element = random_bits((1,), dtype, 3)[0]
    noise = raw(80_000 + 64 * 16, 1)
    with stream_stores(streams):
        for size in (*range(131), *NEAR):
            count = size // width
            for phase in {0, size % 64 // width * width, 16, 48}:
                before = raw(count * width + 256, 2)
                got, want = before.clone(), before.clone()
                start = 64 + phase
                end = start + count * width
                want[start:end] = noise[phase : phase + count * width]
                source = noise[phase : phase + count * width].view(dtype)
                paramkit.copy_(got[start:end].view(dtype), source)
                assert torch.equal(got, want), (size, phase)
                want[start:end].view(dtype)[...] = element
                paramkit.fill_(got[start:end].view(dtype), element)
                assert torch.equal(got, want), (size, phase)


SHAPES = (
    ((1, 1), (1, 0)),
    ((3, 5), (1, 0)),
    ((16, 16), (1, 0)),
    ((63, 65), (1, 0)),
    ((129, 127), (1, 0)),
    ((257, 33), (1, 0)),
    ((31, 1025), (1, 0)),
    ((7, 20, 9), (2, 0, 1)),
    ((12, 10, 3, 3), (2, 3, 1, 0)),
    ((3, 3, 10, 12), (3, 2, 0, 1)),
    ((5, 6, 7, 8), (3, 2, 1, 0)),
    ((4, 20, 7, 7), (0, 2, 3, 1)),
    ((3, 2, 37), (0, 2, 1)),
    ((3, 37, 2), (0, 2, 1)),
)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("streams", (False, True))
@pytest.mark.parametrize("width", WIDTHS)
def test_permutes(backend: str, width: int, streams: bool, threads: int, stream_stores) -> None:
    """Around the tiles, of several loops, in pairs; dense and pitched on either side."""
    torch.set_num_threads(threads)
    for shape, dims in SHAPES:
        for pitch in ((0, 0), (3, 0), (0, 5), (2, 64 // width)):
            source = random_bits((*shape[:-1], shape[-1] + pitch[0]), WIDTHS[width], 4)
            source = source[..., : shape[-1]].permute(dims)
            size = source.shape
            whole = random_bits((*size[:-1], size[-1] + pitch[1]), WIDTHS[width], 5)
            got, want = whole.clone(), whole.clone()
            want[..., : size[-1]].copy_(source)
            with stream_stores(streams):
                paramkit.copy_(got[..., : size[-1]], source)
            assert_same_storage(got, want, f"{shape} -> {dims}, pitch {pitch}")


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_shared_among_threads(backend: str, threads: int) -> None:
    """Large enough for every thread to get a part, cut where a part is cut worst."""
    torch.set_num_threads(threads)
    bf16, f32 = torch.bfloat16, torch.float32
    pairs = {
        "transpose": (torch.zeros(901, 700), torch.rand(700, 901).t()),
        "cast": (torch.zeros(901, 700, dtype=bf16), torch.rand(700, 901).t()),
        "convolution": (torch.zeros(3, 3, 90, 120), torch.rand(120, 90, 3, 3).permute(2, 3, 1, 0)),
        "zip": (torch.zeros(3, 70_001, 2), torch.rand(3, 2, 70_001).transpose(1, 2)),
        "unzip": (torch.zeros(3, 2, 70_001, dtype=bf16), torch.rand(3, 70_001, 2).transpose(1, 2)),
        "rows": (torch.zeros(999, 701)[:, 1:], torch.rand(999, 700)),
        "short rows": (torch.zeros(90_001, 7)[:, 1:6], torch.rand(90_001, 5)),
        "two long rows": (torch.zeros(2, 200_001)[:, 1:], torch.rand(2, 200_000)),
        "general": (torch.zeros(999, 701)[:, ::2], torch.rand(999, 702)[:, ::2]),
        "spread": (torch.zeros(999, 701), torch.rand(999, 1)),
        "cast rows": (torch.zeros(999, 701, dtype=bf16)[:, 1:], torch.rand(999, 700)),
        "cast copy": (torch.zeros(500_001, dtype=f32), torch.rand(500_001).to(bf16)),
        "fill": (torch.zeros(999, 701)[:, 1:], torch.rand(())),
    }
    for name, (got, source) in pairs.items():
        seen = watch(got)
        paramkit.copy_(got, source)
        seen.assert_only_inside()
        assert torch.equal(got, source.to(got.dtype).expand(got.shape)), name


def test_which_family_ran(compiled: str) -> None:
    def family(dst: Tensor, src: Tensor) -> str:
        with paramkit.backend.trace() as trace:
            paramkit.copy_(dst, src)
        assert torch.equal(bits(dst), bits(src.expand(dst.shape)))
        (name,) = trace.routes
        return name

    rand = torch.rand
    assert family(torch.zeros(10, 10), rand(10, 10)) == "copy"
    assert family(torch.zeros(10, 20)[:, :10], rand(10, 10)) == "rows"
    assert family(torch.zeros(10, 12), rand(12, 10).t()) == "transpose"
    assert family(torch.zeros(3, 3, 8, 9), rand(9, 8, 3, 3).permute(2, 3, 1, 0)) == "transpose"
    assert family(torch.zeros(4, 32, 2), rand(4, 2, 32).transpose(1, 2)) == "transpose"
    assert family(torch.zeros(4, 2, 32), rand(4, 32, 2).transpose(1, 2)) == "transpose"
    assert family(torch.zeros(10, 10)[::2, ::2], rand(10, 10)[::2, ::2]) == "general"
    assert family(torch.zeros(10, 10), rand(10, 1)) == "general"
    assert family(torch.zeros(10, 10), rand(())) == "fill"


FEW = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.int64, torch.uint8)
SEED = int(os.environ.get("PARAMKIT_TEST_SEED", "0"))


def one_random_view(seed: int) -> None:
    """One copy between random views; PARAMKIT_TEST_SEED=seed runs it first."""
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    shape = random_shape(rng)
    layout = random_layout(rng, shape)
    got, want = place(layout, dtype), place(layout, dtype)
    cast = not dtype.is_complex and rng.random() < 0.4
    src_dtype = rng.choice(FEW) if cast and dtype in FEW else dtype
    source = place(random_source(rng, shape), src_dtype, seed)
    if src_dtype != dtype:  # values that both can hold
        storage = torch.empty(0, dtype=src_dtype).set_(source.untyped_storage())
        storage.copy_(torch.arange(storage.numel()) % 7)
    seen = watch(got)
    want.copy_(source)
    paramkit.copy_(got, source)
    seen.assert_only_inside()
    assert_same_storage(got, want, f"PARAMKIT_TEST_SEED={seed}")


def test_random_views(backend: str) -> None:
    for seed in range(SEED, SEED + 400):
        one_random_view(seed)


@pytest.mark.slow
def test_many_random_views(backend: str) -> None:
    for seed in range(SEED + 400, SEED + 20_000):
        one_random_view(seed)


@pytest.mark.parametrize("threads", (1, 2, 3, 5))
def test_parts_of_a_list(backend: str, threads: int) -> None:
    """Many small tensors among large ones, shared out among the threads as they like."""
    torch.set_num_threads(threads)
    rng = random.Random(threads)
    dsts, srcs = [], []
    for i in range(300):
        n = rng.choice((1, 7, 64, 100, 3000, 70_000 if i % 50 == 0 else 10))
        src = torch.rand(n, 3)
        kind = i % 4
        dsts.append(torch.zeros(3, n) if kind == 1 else torch.zeros(n, 3 + kind)[:, :3])
        srcs.append(src.t() if kind == 1 else src.to(torch.float16) if kind == 2 else src)
    paramkit.foreach_copy_(dsts, srcs)
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst, src.to(torch.float32))
    assert torch.get_num_threads() == threads
