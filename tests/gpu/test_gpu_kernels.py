"""The kernels at every length, phase and element size: copies, fills, permutes, rows, broadcasts."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import paramkit
from tests.cases import DTYPES
from tests.gpu.storages import (
    assert_as_torch,
    assert_same_storage,
    counted,
    few,
    noise,
    place,
    small_numbers,
    twin,
)
from tests.guards import Layout, contiguous_strides, random_layout, random_shape, random_source

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
SEED = int(os.environ.get("PARAMKIT_TEST_SEED", "0"))

# Contiguous runs.

SLOT = 128  # bytes: a run of up to 95 at any of 16 phases, and something around it


def test_copies_of_every_length_and_phase(device: torch.device) -> None:
    """0 to 95 bytes, source and destination at any phase of a vector; all of them one launch."""
    runs = [*itertools.product(range(96), range(16), range(16))]
    source, got = noise(SLOT * len(runs), device, 1), noise(SLOT * len(runs), device, 2)
    want = got.clone()

    def views(whole: Tensor, side: int) -> list[Tensor]:
        starts = (SLOT * i + 16 + run[side] for i, run in enumerate(runs))
        return [whole[a : a + run[0]] for a, run in zip(starts, runs, strict=True)]

    sources = views(source, 2)
    for dst, src in zip(views(want, 1), sources, strict=True):
        dst.copy_(src)
    counts = counted(lambda: paramkit.foreach_copy_(views(got, 1), sources))
    assert (counts["launches"], counts["uploads"]) == (1, 1)
    wrong = (got != want).nonzero().flatten().tolist()
    assert not wrong, (
        f"{len(wrong)} bytes differ, first at byte {wrong[0] % SLOT} of the slot of "
        f"(length, destination's phase, source's phase) {runs[wrong[0] // SLOT]}"
    )


# Around what a warp and a block do at once, and where a run is shared by several blocks.
LONG = (
    *(511, 512, 513, 1023, 2033, 2047, 2048, 2049, 4079, 4095, 4096, 4097, 4111, 8191, 8193),
    *(16383, 16385, 32767, 32768, 32769, 65537, 131_077, 1_048_593),
)
PHASES = (
    *((0, 0), (0, 1), (1, 0), (3, 3), (4, 8), (8, 4), (15, 2), (16, 48), (127, 64), (64, 127)),
    *((5, 13), (2, 0), (0, 2), (12, 12)),
)  # bytes: of the destination, of the source


@pytest.mark.parametrize("width", WIDTHS)
def test_long_copies(device: torch.device, width: int) -> None:
    largest = max(LONG) + 1024
    source, got = noise(largest, device, 3), noise(largest, device, 4)
    want = got.clone()
    for size, (to, at) in few(itertools.product(LONG, PHASES), device, 11):
        count, to, at = size // width, 256 + to // width * width, 256 + at // width * width
        src = source[at : at + count * width].view(WIDTHS[width])
        want[to : to + count * width].view(WIDTHS[width]).copy_(src)
        paramkit.copy_(got[to : to + count * width].view(WIDTHS[width]), src)
        assert_same_storage(got, want, f"{count} elements, from byte {at} to byte {to}")


@pytest.mark.parametrize("width", WIDTHS)
def test_fills_of_every_length_and_phase(device: torch.device, width: int) -> None:
    """With a number, which travels with the launch; with an element on the device; with one repeated."""
    dtype = WIDTHS[width]
    counts = [*range(96 // width + 1), 511 // width, 2049 // width, 4096 // width, 4097 // width]
    counts += [70_001 // width, 300_007 // width]
    counts = few(counts, device, 5)
    shapes = [(n, phase) for n in counts for phase in range(0, 16, width)]
    element = noise(16, device, 5)[:width].view(dtype)[0]
    number = element.item()

    def views(whole: Tensor) -> list[Tensor]:
        start, all_of_them = 64, []
        for n, phase in shapes:
            all_of_them.append(whole[start + phase : start + phase + n * width].view(dtype))
            start += (n * width // 64 + 2) * 64
        return all_of_them

    size = sum((n * width // 64 + 2) * 64 for n, _ in shapes) + 128
    pattern = noise(size, device, 6)
    want = pattern.clone()
    for dst in views(want):
        dst.fill_(element)
    for how in ("number", "element", "repeated"):
        got = pattern.clone()
        dsts = views(got)
        if how == "repeated":
            paramkit.foreach_copy_(dsts, [element.expand(dst.shape) for dst in dsts])
        else:
            paramkit.foreach_fill_(dsts, number if how == "number" else element)
        assert_same_storage(got, want, how)
        for dst in views(got):  # one by one
            dst.zero_()
            paramkit.fill_(dst, number if how == "number" else element)
        assert_same_storage(got, want, f"{how}, one by one")


@pytest.mark.parametrize("width", WIDTHS)
def test_strided_fills(device: torch.device, width: int) -> None:
    """Columns, every other element, the centre of a kernel, rows of odd length: no byte between is written."""
    whole = place(Layout.dense((37, 46, 3, 3)), WIDTHS[width], device)
    element = noise(16, device, 7)[:width].view(WIDTHS[width])[0]
    views = {
        "a column": lambda t: t[:, 5],
        "an element a row": lambda t: t[:, 1:2, 1:2, 1:2],
        "the centre": lambda t: t[:, :, 1:2, 1:2],
        "every other": lambda t: t.flatten()[1::2],
        "odd rows": lambda t: t.view(37, -1)[:, 3:300],
        "odd rows, apart": lambda t: t.view(37, -1)[1::3, 1:6],
        "a diagonal": lambda t: t[:, :, 0, 0].diagonal(),
    }
    for name, view in views.items():
        for value in (element.item(), element):
            got, want = twin(whole), twin(whole)
            view(want).fill_(element)
            paramkit.fill_(view(got), value)
            assert_same_storage(got, want, f"{name}, {type(value).__name__}")


# Permutes.

# Around the sides of tiles: 32, 64 or 128 elements; 8 is the shortest run that is worth one.
EDGES = (1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
PITCHES = (
    (0, 0),
    (3, 0),
    (0, 5),
    (1, 2),
    (4, 8),
)  # elements between rows: of the source, of the destination
DEEP = (
    ((2, 5, 33, 65), (0, 1, 3, 2)),
    ((3, 100, 70), (2, 1, 0)),
    ((9, 130, 131), (0, 2, 1)),
    ((130, 3, 129), (2, 1, 0)),
    ((12, 10, 3, 3), (2, 3, 1, 0)),
    ((64, 48, 3, 3), (2, 3, 1, 0)),
    ((3, 3, 40, 50), (3, 2, 0, 1)),
    ((4, 20, 7, 7), (0, 2, 3, 1)),
    ((2, 64, 70, 32), (0, 2, 1, 3)),
    ((32, 8, 64), (1, 0, 2)),
    ((3, 2, 37), (0, 2, 1)),
    ((3, 1000, 2), (0, 2, 1)),
    ((5, 6, 7, 8), (3, 2, 1, 0)),
    ((2, 3, 4, 5, 6), (4, 2, 0, 3, 1)),
)
Permute = tuple[tuple[int, ...], tuple[int, ...]]


def permutes(device: torch.device, seed: int) -> list[Permute]:
    """All of them; a few where each costs milliseconds."""
    flat: list[Permute] = [(sizes, (1, 0)) for sizes in itertools.product(EDGES, EDGES)]
    if device.type == "cuda":
        return [*flat, *DEEP]
    rng = random.Random(seed)
    return [*rng.sample(flat, 20), *rng.sample(DEEP, 5)]


def permuted(
    permute: Permute,
    pitch: tuple[int, int],
    dst: torch.dtype,
    src: torch.dtype,
    device: torch.device,
) -> tuple[str, Tensor, Tensor]:
    """The source dense but for its pitch, the destination dense in the permuted shape but for its own."""
    shape, dims = permute

    def pitched(shape: tuple[int, ...], extra: int, dtype: torch.dtype, seed: int | None) -> Tensor:
        strides = contiguous_strides((*shape[:-1], shape[-1] + extra))
        return place(Layout.dense(shape, strides), dtype, device, seed)

    source = pitched(shape, pitch[0], src, 8)
    if dst != src:
        small_numbers(source)
    source = source.permute(dims)
    return f"{shape} by {dims}", pitched(tuple(source.shape), pitch[1], dst, None), source


@pytest.mark.parametrize("width", WIDTHS)
def test_permutes(device: torch.device, width: int) -> None:
    """Around the tiles, batched, of several loops; dense and pitched, aligned for whole cells or not."""
    for seed, pitch in enumerate(PITCHES):
        pairs = [
            permuted(permute, pitch, WIDTHS[width], WIDTHS[width], device)
            for permute in permutes(device, seed)
        ]
        assert_as_torch(pairs, f"pitches {pitch}")


@pytest.mark.parametrize("src", (torch.uint8, torch.float16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize(
    "dst", (torch.float8_e5m2, torch.bfloat16, torch.int32, torch.int64), ids=str
)
def test_permutes_with_a_cast(device: torch.device, dst: torch.dtype, src: torch.dtype) -> None:
    """From elements of every size to elements of every size."""
    for seed, pitch in enumerate(PITCHES[::2]):
        pairs = [permuted(permute, pitch, dst, src, device) for permute in permutes(device, seed)]
        assert_as_torch(pairs, f"pitches {pitch}")


# Rows, broadcasts, any strides.

RUNS = (
    *(1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257),
    *(511, 512, 513, 1000, 2049, 8191, 8192, 8193, 16385, 20_001),
)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_odd_pitch(device: torch.device, width: int) -> None:
    """Runs of every length, rows that begin at every phase on both sides."""
    dtype = WIDTHS[width]

    def rows(run: int, pitch: int, offset: int, seed: int | None) -> Tensor:
        count = 37 if run < 1000 else 5
        layout = Layout((count, run), (run + pitch, 1), 16 + offset, count * (run + pitch) + 64)
        return place(layout, dtype, device, seed)

    pitches = ((1, 0), (0, 1), (3, 5), (16, 16), (0, 64))
    offsets = ((0, 0), (1, 2), (5, 5))
    for pitch, offset in few(itertools.product(pitches, offsets), device, 7):
        pairs = [
            (
                f"rows of {run}",
                rows(run, pitch[0], offset[0], None),
                rows(run, pitch[1], offset[1], run),
            )
            for run in few(RUNS, device, 2)
            if run * width <= 33_000
        ]
        assert_as_torch(pairs, f"pitches {pitch}, offsets {offset}")


def broadcasts(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A source's axes of one, missing ones, and strides of 0, inside and outside of what it has."""
    shapes = (
        ((1000,), ()),
        ((64, 65), (65,)),
        ((64, 65), (64, 1)),
        ((5, 6, 700), (6, 1)),
        ((5, 6, 700), (5, 1, 700)),
        ((5, 6, 7, 8), (1, 6, 1, 8)),
        ((2, 33, 3, 17), (33, 1, 1)),
        ((300, 3), (300, 1)),
        ((3, 4099), (3, 1)),
    )
    for shape, source in shapes:
        dst, src = Layout.dense(shape), Layout.dense(source)
        yield f"{source} to {shape}", place(dst, dtype, device), place(src, dtype, device, 9)
    turned = place(Layout.dense((65, 33)), dtype, device, 10).t()
    yield "transposed, again and again", place(Layout.dense((8, 33, 65)), dtype, device), turned
    window = place(Layout.dense((40, 50), (1, 1)), dtype, device, 11)
    yield "overlapping windows", place(Layout.dense((40, 50)), dtype, device), window


@pytest.mark.parametrize("width", WIDTHS)
def test_broadcasts(device: torch.device, width: int) -> None:
    assert_as_torch(broadcasts(WIDTHS[width], device), "broadcast")


def test_many_loops(device: torch.device) -> None:
    """Twelve loops that cannot be merged, permuted at random."""
    rng = random.Random(12)
    shape = tuple(rng.choice((1, 2, 3)) for _ in range(12))
    for turn in range(4):
        pairs = []
        for dtype in WIDTHS.values():
            order = [*range(12)]
            rng.shuffle(order)
            inner = place(Layout.dense([shape[axis] for axis in order]), dtype, device, turn)
            back = sorted(range(12), key=order.__getitem__)
            dst = place(random_layout(rng, shape), dtype, device)
            pairs.append((f"order {order}", dst, inner.permute(back)))
        assert_as_torch(pairs, f"turn {turn}")


def random_pair(rng: random.Random, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Views of any shape, dtype and strides, with and without a cast."""
    dtype = rng.choice(DTYPES)
    shape = random_shape(rng)
    dst = place(random_layout(rng, shape), dtype, device)
    casts = not dtype.is_complex and rng.random() < 0.4
    src_dtype = rng.choice([d for d in DTYPES if not d.is_complex]) if casts else dtype
    src = place(random_source(rng, shape), src_dtype, device, seed)
    return dst, small_numbers(src) if src_dtype != dtype else src


def test_random_views(device: torch.device) -> None:
    """PARAMKIT_TEST_SEED=seed runs one of them first."""
    for seed in range(SEED, SEED + (600 if device.type == "cuda" else 100)):
        got, source = random_pair(random.Random(seed), seed, device)
        want = twin(got)
        want.copy_(source)
        paramkit.copy_(got, source)
        casts = got.dtype != source.dtype
        assert_same_storage(got, want, f"PARAMKIT_TEST_SEED={seed}", any_nan=casts)


def test_shared_among_blocks(cuda: torch.device) -> None:
    """Millions of elements of every family, cut into parts that end anywhere; all in one launch."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=cuda)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, device=cuda)

    bf16 = torch.bfloat16
    pairs = [
        ("copy", zeros(5_000_003), rand(5_000_003)),
        (
            "copy, shifted",
            zeros(5_000_003).view(torch.uint8)[3:-9],
            rand(5_000_003).view(torch.uint8)[12:],
        ),
        ("transpose", zeros(1901, 1700), rand(1700, 1901).t()),
        ("transpose, cast", zeros(1901, 1700, dtype=bf16), rand(1700, 1901).t()),
        ("convolution", zeros(3, 3, 190, 220), rand(220, 190, 3, 3).permute(2, 3, 1, 0)),
        ("zip", zeros(3, 170_001, 2), rand(3, 2, 170_001).transpose(1, 2)),
        ("unzip, cast", zeros(3, 2, 170_001, dtype=bf16), rand(3, 170_001, 2).transpose(1, 2)),
        ("rows", zeros(1999, 1701)[:, 1:], rand(1999, 1700)),
        ("short rows", zeros(390_001, 7)[:, 1:6], rand(390_001, 5)),
        ("two long rows", zeros(2, 2_000_001)[:, 1:], rand(2, 2_000_000)),
        ("general", zeros(1999, 1701)[:, ::2], rand(1999, 1702)[:, ::2]),
        ("spread", zeros(1999, 1701), rand(1999, 1)),
        ("rows, cast", zeros(1999, 1701, dtype=bf16)[:, 1:], rand(1999, 1700)),
        ("cast", zeros(5_000_001), rand(5_000_001).to(bf16)),
        ("cast, other phase", zeros(5_000_001)[1:], rand(5_000_000).to(bf16)),
        ("fill", zeros(1999, 1701)[:, 1:], rand(())),
        ("fill, cast", zeros(4_000_001, dtype=bf16)[1:], rand(())),
    ]
    wants = [twin(dst) for _, dst, _ in pairs]
    for want, (_, _, src) in zip(wants, pairs, strict=True):
        want.copy_(src)
    counts = counted(
        lambda: paramkit.foreach_copy_([dst for _, dst, _ in pairs], [src for _, _, src in pairs])
    )
    assert counts["launches"] == 1
    for want, (name, dst, _) in zip(wants, pairs, strict=True):
        assert_same_storage(dst, want, name)
