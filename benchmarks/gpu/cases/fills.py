"""Slice fills of ten thousand convolution weights, and fills of one dense tensor."""

from __future__ import annotations

import torch
from torch import Tensor

import paramkit
from benchmarks.cases.registry import moved
from tests import cases as layouts

from .. import calls, inputs
from ..device import GIB, MIB, Device
from ..registry import Work, case, group, targets

SLICES = group("slice fills", "Slice fills of 10,000 weights, w[:, :, 1:2, 1:2]")
FILLS = group("fills", "Fills of one float32 tensor")

LOOP = "loop of fill_"


def _weights(tiny: bool, gpu: Device) -> list[Tensor]:
    """Weights (8, 8, 3, 3): a tap is 64 elements, 36 bytes apart."""
    count = 20 if tiny else 10_000
    return [inputs.zeros((8, 8, 3, 3), torch.float32, gpu.where) for _ in range(count)]


def _work(weights: list[Tensor], views: list[Tensor], ours: calls.Call) -> Work:
    def peer() -> None:
        for view in views:
            view.fill_(0.5)

    return Work(
        ours=ours,
        peer=peer,
        dsts=weights,
        bytes=moved(views),
        keep=[views],
        facts={"tensors": len(views)},
    )


@case(
    "fill slices 10000",
    SLICES,
    "foreach_fill_ of 10,000 ready views, eager, against a loop of fill_",
    targets(10),
    clock="wall",
    peer=LOOP,
    limit=None,
    seconds=2.5,
)
def eager(tiny: bool, gpu: Device) -> Work:
    weights = _weights(tiny, gpu)
    views = layouts.centre_views(weights)
    return _work(weights, views, lambda: paramkit.foreach_fill_(views, 0.5))


@case(
    "replay slices 10000",
    SLICES,
    "plan(views, 0.5).apply(), again and again, against it",
    targets(100),
    peer=LOOP,
    limit=None,
    uploads=0,
    seconds=2.5,
)
def replay(tiny: bool, gpu: Device) -> Work:
    weights = _weights(tiny, gpu)
    views = layouts.centre_views(weights)
    return _work(weights, views, paramkit.plan(views, 0.5).apply)


SIZES = (("64 KiB", 64 * 1024), ("1 MiB", MIB), ("64 MiB", 64 * MIB), ("1 GiB", GIB))


def _dense() -> None:
    for text, size in SIZES:

        @case(
            f"fill {text}",
            FILLS,
            f"fill_ of one contiguous float32 tensor of {text}",
            targets(),
            clock="wall" if size <= MIB else "events",
            peer="fill_",
            limit=None,
            seconds=0.6,
            quick=size in (MIB, GIB),
        )
        def fill(tiny: bool, gpu: Device, size: int = size) -> Work:
            count = min(size, 4096 if tiny else size) // 4
            return calls.fills(lambda: inputs.zeros((count,), torch.float32, gpu.where), 0.5, gpu)


_dense()
