"""Lists in one call: ten thousand small tensors, a thousand large ones, and a mix of everything."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from tests import cases as layouts

from .. import calls, inputs
from ..device import GIB, Device
from ..registry import Pair, Work, case, group, targets

SMALL = group("small", "10,000 tensors of 1024 bfloat16")
LARGE = group("large", "Lists of large tensors")

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
F8, U8 = torch.float8_e4m3fn, torch.uint8

FOREACH = "_foreach_copy_"


def _small(tiny: bool, gpu: Device) -> tuple[list[Tensor], list[Tensor]]:
    count, numel = (20, 32) if tiny else (10_000, 1024)
    dsts = [inputs.zeros((numel,), BF16, gpu.where) for _ in range(count)]
    return dsts, inputs.apart(count, numel, BF16, gpu.where)


@case(
    "foreach_copy 10000x1024",
    SMALL,
    "foreach_copy_, eager",
    targets(3),
    clock="wall",
    peer=FOREACH,
    seconds=2.5,
)
def eager(tiny: bool, gpu: Device) -> Work:
    return calls.lists(*_small(tiny, gpu))


@case(
    "replay 10000x1024",
    SMALL,
    "plan(dsts, srcs).apply(), again and again",
    targets(20),
    peer=FOREACH,
    uploads=0,
    seconds=2.5,
)
def replay(tiny: bool, gpu: Device) -> Work:
    return calls.replay(*_small(tiny, gpu))


@case(
    "graph replay 10000x1024",
    SMALL,
    "a graph of plan(dsts, srcs).apply(), against an eager _foreach_copy_",
    targets(30),
    peer=FOREACH,
    uploads=0,
    seconds=2.5,
)
def graph(tiny: bool, gpu: Device) -> Work:
    # Here the device is the slow part, so what its cache holds counts: three sets in turn.
    made = [calls.replay(*_small(tiny, gpu)) for _ in range(3)]
    for work in made:  # what is loaded at the first call cannot be captured
        work.ours()
        work.peer()
    return Work(
        ours=calls.in_turn([gpu.capture(work.ours) for work in made]),
        peer=calls.in_turn([work.peer for work in made]),
        dsts=[dst for work in made for dst in work.dsts],
        bytes=made[0].bytes,
        turns=len(made),
        others={"torch graph": calls.in_turn([gpu.capture(work.peer) for work in made])},
        counted=calls.in_turn([work.ours for work in made]),
        keep=[made],
        facts={**made[0].facts, "sets": len(made)},
    )


@case(
    "foreach_copy 1024x1MiB",
    LARGE,
    "1024 bfloat16 tensors of 1 MiB, the same layout on both sides, eager",
    targets(1.15, limit=0.93),
    peer=FOREACH,
    seconds=2.0,
)
def large(tiny: bool, gpu: Device) -> Work:
    count, numel = (6, 3000) if tiny else (1024, 512 * 1024)
    dsts = [inputs.zeros((numel,), BF16, gpu.where) for _ in range(count)]
    return calls.lists(dsts, inputs.apart(count, numel, BF16, gpu.where))


# The mix. Shapes and kinds take turns, as the weights of a model do: most are some hundred thousand
# elements, some are vectors. Seven shapes and twelve kinds: each kind comes in each shape.

SHAPES = (
    (1024, 1024),
    (512, 2048),
    (768, 768),
    (2048, 512),
    (256, 4096),
    (1536, 384),
    (640, 1280),
)
TINY_SHAPES = ((16, 24), (40, 8), (24, 24), (8, 32), (64, 16))

Make = Callable[[tuple[int, ...], torch.dtype], Tensor]


def _dense(rows: int, cols: int, to: torch.dtype, source: torch.dtype, make: Make) -> Pair:
    return torch.zeros(rows, cols, dtype=F32).to(to), make((rows, cols), source)


def _transposed(rows: int, cols: int, to: torch.dtype, source: torch.dtype, make: Make) -> Pair:
    return torch.zeros(cols, rows, dtype=F32).to(to), make((rows, cols), source).t()


def _columns_of_source(
    rows: int, cols: int, to: torch.dtype, source: torch.dtype, make: Make
) -> Pair:
    half = cols // 2
    return torch.zeros(rows, half, dtype=F32).to(to), make((rows, cols), source)[:, half:]


KINDS: tuple[Callable[[int, int, Make], Pair], ...] = (
    lambda r, c, make: _dense(r, c, BF16, BF16, make),
    lambda r, c, make: _dense(r, c, BF16, F32, make),
    lambda r, c, make: _transposed(r, c, F32, F32, make),
    lambda r, c, make: layouts.column_slice(r, c // 2, F16, make),
    lambda r, c, make: _dense(1, r, F32, F32, make),
    lambda r, c, make: _transposed(r, c, BF16, BF16, make),
    lambda r, c, make: _dense(r, c, BF16, F8, make),
    lambda r, c, make: layouts.permuted((8, r // 8, c), (1, 0, 2), BF16, make),
    lambda r, c, make: _columns_of_source(r, c, F32, BF16, make),
    lambda r, c, make: _transposed(r, c, BF16, F32, make),
    lambda r, c, make: _transposed(r, c, U8, U8, make),
    lambda r, c, make: layouts.permuted((r, c // 8, 8), (2, 0, 1), F32, make),
)


def mixed(tiny: bool, gpu: Device) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs of every kind in turn, until they write 4 GiB; 2 GiB where the memory is small."""
    enough = 20_000 if tiny else 4 * GIB if gpu.memory > 24 * GIB else 2 * GIB
    shapes = itertools.cycle(TINY_SHAPES if tiny else SHAPES)
    dsts: list[Tensor] = []
    srcs: list[Tensor] = []
    written = 0
    with inputs.made_on(gpu) as make:
        for kind in itertools.cycle(KINDS):
            dst, src = kind(*next(shapes), make)
            dsts.append(dst)
            srcs.append(src)
            written += dst.numel() * dst.element_size()
            # A whole number of rounds, so that each kind is there as often.
            if written >= enough and len(dsts) % len(KINDS) == 0:
                return dsts, srcs
    raise AssertionError("unreachable")


@case(
    "mixed list",
    LARGE,
    "foreach_copy_ of 4 GiB: dense, cast, transposed, permuted, column slices, eager",
    targets(5, limit=0.85),
    peer=FOREACH,
    seconds=3.0,
)
def mixed_list(tiny: bool, gpu: Device) -> Work:
    work = calls.lists(*mixed(tiny, gpu))
    work.others.clear()  # torch's own falls back to the loop here
    work.facts["written_bytes"] = sum(dst.numel() * dst.element_size() for dst in work.dsts)
    return work


@case(
    "replay mixed list",
    LARGE,
    "the same, plan(dsts, srcs).apply()",
    targets(limit=0.85),
    peer=FOREACH,
    uploads=0,
    seconds=2.0,
    quick=False,
)
def replay_mixed_list(tiny: bool, gpu: Device) -> Work:
    return calls.replay(*mixed(tiny, gpu))
