"""Copies in which rows stay whole: slices of wider tensors, odd pitches, the outer dimensions permuted."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import cases as layouts

from .. import calls, inputs
from ..device import Device
from ..registry import Work, case, group, targets
from .permutes import permuted, short

ROWS = group("rows", "Rows that stay whole")

BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8


def _pitched() -> None:
    for dtype in (BF16, U8):

        @case(
            f"rows of odd pitch {short(dtype)}",
            ROWS,
            f"copy_ of 16384 rows of 4095 {short(dtype)}, 4097 apart, into rows 4099 apart",
            targets(),
            seconds=0.8,
            quick=dtype == BF16,
        )
        def rows(tiny: bool, gpu: Device, dtype=dtype) -> Work:
            count, width = (9, 95) if tiny else (16384, 4095)

            def make() -> tuple[Tensor, Tensor]:
                dst = inputs.zeros((count, width + 4), dtype, gpu.where)
                src = inputs.numbers((count, width + 2), dtype, gpu.where)
                return dst[:, 3 : 3 + width], src[:, 1 : 1 + width]

            return calls.copies(make, gpu)


_pitched()


@case(
    "column slice float32",
    ROWS,
    "copy_ into 4096 columns inside 8192 rows of 16384",
    targets(),
    seconds=0.8,
)
def columns(tiny: bool, gpu: Device) -> Work:
    rows, width = (8, 64) if tiny else (8192, 4096)

    def make() -> tuple[Tensor, Tensor]:
        with inputs.made_on(gpu) as on_device:
            return layouts.column_slice(rows, width, F32, on_device)

    return calls.copies(make, gpu)


def _permuted() -> None:
    # Only the outer dimensions change places: torch is at the memory's speed here, too.
    for dtype in (F32, BF16):

        @case(
            f"permute 32x128x4096->102 {short(dtype)}",
            ROWS,
            f"copy_ of a (32, 128, 4096) {short(dtype)} tensor, permute(1, 0, 2)",
            targets(limit=0.9),
            seconds=0.8,
            quick=dtype == BF16,
        )
        def permute(tiny: bool, gpu: Device, dtype=dtype) -> Work:
            shape = (3, 40, 72) if tiny else (32, 128, 4096)
            return permuted(shape, (1, 0, 2), dtype, dtype, gpu)


_permuted()
