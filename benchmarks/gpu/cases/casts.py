"""Conversions of contiguous tensors, 512 MiB read and written together."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import calls, inputs
from ..device import MIB, Device
from ..registry import Work, case, group, targets
from .permutes import label, short

CASTS = group("casts", "Conversions, 512 MiB read and written together")

PAIRS = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float8_e4m3fn),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.bfloat16, torch.float8_e5m2),
    (torch.float8_e4m3fn, torch.bfloat16),
    (torch.float8_e4m3fn, torch.float32),
    (torch.int32, torch.float32),
    (torch.uint8, torch.bfloat16),
)
QUICK = {
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float8_e4m3fn, torch.bfloat16),
}
COMPILED = {(torch.float32, torch.bfloat16)}


def _pairs() -> None:
    for source, dtype in PAIRS:

        @case(
            f"cast {label(source, dtype)}",
            CASTS,
            f"copy_ of a contiguous {short(source)} tensor into {short(dtype)}",
            targets(),
            seconds=0.6,
            compile=(source, dtype) in COMPILED,
            quick=(source, dtype) in QUICK,
        )
        def cast(tiny: bool, gpu: Device, source=source, dtype=dtype) -> Work:
            count = 1000 if tiny else 512 * MIB // (source.itemsize + dtype.itemsize)

            def make() -> tuple[Tensor, Tensor]:
                return (
                    inputs.zeros((count,), dtype, gpu.where),
                    inputs.numbers((count,), source, gpu.where),
                )

            return calls.copies(make, gpu)


_pairs()
