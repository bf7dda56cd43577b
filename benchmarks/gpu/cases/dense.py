"""Contiguous copies from 64 KiB to 1 GiB, and copies that do not begin where vectors do.

torch copies contiguous memory by cudaMemcpyAsync: this is as fast as the driver's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import calls, inputs
from ..device import GIB, MIB, Device
from ..registry import Work, case, group, targets

COPIES = group("copies", "Contiguous copies of one float32 tensor")
MISALIGNED = group("misaligned", "Contiguous copies of 256 MiB that are not aligned")

SIZES = (
    ("64 KiB", 64 * 1024),
    ("1 MiB", MIB),
    ("16 MiB", 16 * MIB),
    ("64 MiB", 64 * MIB),
    ("256 MiB", 256 * MIB),
    ("1 GiB", GIB),
)


def _sized() -> None:
    for text, size in SIZES:

        @case(
            f"copy {text}",
            COPIES,
            f"copy_ of one contiguous float32 tensor of {text}",
            targets(),
            clock="wall" if size <= MIB else "events",
            peer="copy_ (cudaMemcpyAsync)",
            seconds=0.6,
            quick=size in (MIB, 64 * MIB, GIB),
        )
        def copy(tiny: bool, gpu: Device, size: int = size) -> Work:
            count = min(size, 4096 if tiny else size) // 4

            def make() -> tuple[Tensor, Tensor]:
                return (
                    inputs.zeros((count,), torch.float32, gpu.where),
                    inputs.numbers((count,), torch.float32, gpu.where),
                )

            return calls.copies(make, gpu)


# Elements that the destination and the source begin behind an aligned address.
OFFSETS = (
    (torch.uint8, 1, 1),
    (torch.uint8, 1, 2),
    (torch.uint8, 0, 7),
    (torch.bfloat16, 1, 4),
)


def _misaligned() -> None:
    for dtype, to, source in OFFSETS:
        name = str(dtype).removeprefix("torch.")

        @case(
            f"misaligned {name} {to} {source}",
            MISALIGNED,
            f"copy_ of contiguous {name}, from element {source} on to element {to} on",
            targets(),
            seconds=0.6,
            quick=(to, source) == (1, 2),
        )
        def copy(tiny: bool, gpu: Device, dtype=dtype, to=to, source=source) -> Work:
            count = (5000 if tiny else 256 * MIB) // dtype.itemsize

            def make() -> tuple[Tensor, Tensor]:
                dst = inputs.zeros((count + 32,), dtype, gpu.where)
                src = inputs.numbers((count + 32,), dtype, gpu.where)
                return dst[to : to + count], src[source : source + count]

            return calls.copies(make, gpu)


_sized()
_misaligned()
