"""Messages in one process: what they hold, their size, and that packing and unpacking is copying."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from paramkit.boxes import Box, boxes, elements, halved, placed
from paramkit.distributed.routes import Piece, Stream
from paramkit.distributed.traffic import (
    ALIGN,
    HEADER,
    Locals,
    Traffic,
    messages,
    wire_dtype,
)
from paramkit.pieces import view_of
from tests.guards import assert_same_bits, place, random_layout, random_shape, watch

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_box(rng: random.Random, shape: tuple[int, ...]) -> tuple[Box, tuple[int, ...]]:
    """A piece of a tensor of this shape, and the shape of one that holds it with its axes in another order."""
    order = rng.sample(range(len(shape)), len(shape))
    other = tuple(shape[k] for k in order)
    row = [1] * len(other)
    for k in range(len(other) - 2, -1, -1):
        row[k] = row[k + 1] * other[k + 1]
    ours = [1] * len(shape)
    for k in range(len(shape) - 2, -1, -1):
        ours[k] = ours[k + 1] * shape[k + 1]
    strides = tuple(row[order.index(k)] for k in range(len(shape)))
    (box,) = boxes((shape, tuple(ours), 0, strides, 0), shape, other)
    return box, other


def addresses(box: Box, shape: tuple[int, ...], second: bool) -> list[int]:
    """Of a box's elements in a dense tensor, in order."""
    row = [1] * len(shape)
    for k in range(len(shape) - 2, -1, -1):
        row[k] = row[k + 1] * shape[k + 1]
    steps, offset = placed(box.second if second else box.first, row)
    numbers = torch.arange(max(1, torch.Size(shape).numel()))
    found: list[int] = view_of(numbers, box.sizes, steps, offset).flatten().tolist()
    return found


@pytest.mark.parametrize("seed", range(60))
def test_halved_boxes_are_within_the_limit_and_hold_each_pair_once(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(n for n in random_shape(rng, 4) if n) or (3,)
    box, other = random_box(rng, shape)
    limit = rng.choice([1, 2, 3, 7, 64, 10_000])
    parts = list(halved(box, limit))
    assert all(0 < elements(part) <= limit for part in parts)
    pairs = [
        pair
        for part in parts
        for pair in zip(addresses(part, shape, False), addresses(part, other, True), strict=True)
    ]
    wanted = zip(addresses(box, shape, False), addresses(box, other, True), strict=True)
    assert Counter(pairs) == Counter(wanted)
    if elements(box) <= limit:
        assert parts == [box]


@dataclass
class Case:
    """Random tensors, and streams from rank 0 to rank 1 of all their pieces."""

    streams: list[Stream]
    dtypes: list[torch.dtype]
    sent: Locals
    received: Locals
    wanted: list[Tensor]


def case(rng: random.Random, counts: tuple[int, ...]) -> Case:
    streams = [Stream(0, (1,)) for _ in counts]
    dtypes, src, dst, wanted = [], [], [], []
    for stream, count in zip(streams, counts, strict=True):
        for _ in range(count):
            shape = tuple(n or 1 for n in random_shape(rng, 3))
            box, other = random_box(rng, shape)
            kind = rng.choice(DTYPES)
            to = rng.choice(FLOATS) if kind in FLOATS else kind
            held = place(random_layout(rng, other), kind, seed=rng.randrange(1 << 30))
            if kind.is_floating_point:  # every finite value, as conversions of NaN differ in bits
                held.copy_(torch.randn(other, dtype=torch.float64))
            written = place(random_layout(rng, shape), to)
            stream.pieces.append(Piece(len(src), box))
            src.append(held)
            dst.append(written)
            dtypes.append(wire_dtype(kind, to))
            steps, offset = placed(box.second, held.stride())
            wanted.append(view_of(held, box.sizes, steps, offset).to(to))
    return Case(streams, dtypes, Locals([None] * len(src), src), Locals(dst, []), wanted)


def moved(case: Case, capacity: int, sums: bool = False) -> tuple[Traffic, Traffic]:
    """Everything from one to the other."""
    there = Traffic(case.streams, 0, case.sent, case.dtypes, capacity, sums)
    here = Traffic(case.streams, 1, case.received, case.dtypes, capacity, sums)
    assert len(there.rounds) == len(here.rounds)
    for sent, received in zip(there.rounds, here.rounds, strict=True):
        assert sent.receives == [] and received.sends == []
        assert sent.pack.run(None)
        pairs = zip(sent.sends, received.receives, strict=True)
        for (number, a, message), (same, b, other) in pairs:
            assert (number, message) == (same, other)
            b.copy_(a)
        assert received.unpack.run(None)
    return there, here


@pytest.mark.usefixtures("one_memory")
@pytest.mark.parametrize("sums", [False, True])
def test_packed_and_unpacked_is_copied(sums: bool) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        counts = tuple(rng.choice([0, 1, 5, 9]) for _ in range(rng.choice([1, 3])))
        check_case(case(rng, counts), rng.choice([256, 4096, 1 << 20]), sums)


def check_case(found: Case, capacity: int, sums: bool) -> None:
    guard = watch(*found.received.dst)
    there, here = moved(found, capacity, sums)
    guard.assert_only_inside()
    for got, want in zip(found.received.dst, found.wanted, strict=True):
        assert_same_bits(got, want)
    assert there.bytes_sent == here.bytes_received and there.count == here.count
    assert there.bytes_received == here.bytes_sent == 0
    payload = sum(w.numel() * d.itemsize for w, d in zip(found.wanted, found.dtypes, strict=True))
    assert there.bytes_sent >= payload
    streams = sum(bool(s.pieces) for s in found.streams)
    for traffic in (there, here):
        held = [m for r in traffic.rounds for _, _, m in (*r.sends, *r.receives)]
        of_sums = max((8 * len(m.parts) + ALIGN for m in held), default=0) if sums else 0
        assert traffic.staging <= 2 * streams * (capacity + HEADER + of_sums)


@pytest.mark.parametrize("seed", range(20))
def test_messages_are_full_and_no_fuller(seed: int) -> None:
    rng = random.Random(seed)
    found = case(rng, (12,))
    for capacity in (64, 256, 4096, 1 << 22):
        cut = list(messages(found.streams[0], found.dtypes, capacity))
        parts = Counter[int]()
        for message in cut:
            end = 0
            for piece, dtype, at in message.parts:
                assert at % ALIGN == 0 and at >= end
                end = at + elements(piece.box) * dtype.itemsize
                assert dtype == found.dtypes[piece.write]
                parts[piece.write] += elements(piece.box)
            assert end <= min(message.bytes, capacity)
            assert message.bytes % ALIGN == 0 and message.bytes < end + ALIGN
        for one, two in pairwise(cut):
            first = two.parts[0]
            size = elements(first.piece.box) * first.dtype.itemsize
            assert one.bytes + size > capacity  # it did not fit any more
        assert parts == {k: w.numel() for k, w in enumerate(found.wanted)}


def test_what_travels_is_the_narrower() -> None:
    assert wire_dtype(torch.float32, torch.bfloat16) == torch.bfloat16
    assert wire_dtype(torch.bfloat16, torch.float32) == torch.bfloat16
    assert wire_dtype(torch.float16, torch.bfloat16) == torch.bfloat16
    assert wire_dtype(torch.int64, torch.float32) == torch.float32


def test_buffers_are_two_for_each_stream_however_many_messages() -> None:
    source = torch.randn(1 << 18)
    (box,) = boxes(((1 << 18,), (1,), 0, (1,), 0), source.shape, source.shape)
    stream = Stream(0, (1, 2), [Piece(0, box)])
    traffic = Traffic([stream], 0, Locals([None], [source]), [torch.float32], 4096)
    assert len(traffic.rounds) == 256
    assert traffic.staging == 2 * (4096 + HEADER)
    assert len({buffer.data_ptr() for r in traffic.rounds for _, buffer, _ in r.sends}) == 2
    assert traffic.bytes_sent == 2 * source.numel() * 4  # to each of two


def test_no_streams_no_rounds() -> None:
    traffic = Traffic([], 0, Locals([], []), [], 4096)
    assert (traffic.rounds, traffic.staging, traffic.count) == ([], 0, 0)
