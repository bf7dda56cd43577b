"""Permuted copies in which the last dimension moves, with and without a conversion in the same pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import calls, inputs
from ..device import Device
from ..registry import Work, case, group, targets

TRANSPOSES = group("transposes", "8192 x 8192, transposed")
PERMUTES = group("permutes", "(32, 128, 4096), permuted")

HELD = targets(3, limit=0.9)
"""Of a permuted copy, with and without a conversion."""

BF16, F32, F8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
DTYPES = (F32, BF16, F8)
CASTS = ((F32, BF16), (BF16, F32), (F8, BF16), (BF16, F8))

# torch.compile takes seconds a case: it is a side of some.
COMPILED = {(F32, F32), (BF16, BF16), (F32, BF16)}
QUICK = {(F32, F32), (BF16, BF16), (F8, F8), (F32, BF16)}


def short(dtype: torch.dtype) -> str:
    """ "float32" and so on."""
    return str(dtype).removeprefix("torch.")


def label(source: torch.dtype, dtype: torch.dtype) -> str:
    """ "float32", or "float32->bfloat16"."""
    return short(dtype) if source == dtype else f"{short(source)}->{short(dtype)}"


def permuted(
    shape: Sequence[int],
    dims: Sequence[int],
    source: torch.dtype,
    dtype: torch.dtype,
    gpu: Device,
) -> Work:
    """A dense `shape` of `source`, seen through `dims`, into a dense tensor of `dtype`."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        view = inputs.numbers(shape, source, gpu.where).permute(tuple(dims))
        return inputs.zeros(view.shape, dtype, gpu.where), view

    return calls.copies(make, gpu)


def _transposes() -> None:
    for source, dtype in (*((each, each) for each in DTYPES), *CASTS):

        @case(
            f"transpose 8192x8192 {label(source, dtype)}",
            TRANSPOSES,
            f"copy_ of an 8192 x 8192 {short(source)} tensor, transposed, into {short(dtype)}",
            HELD,
            compile=(source, dtype) in COMPILED,
            quick=(source, dtype) in QUICK,
        )
        def transpose(tiny: bool, gpu: Device, source=source, dtype=dtype) -> Work:
            return permuted((100, 72) if tiny else (8192, 8192), (1, 0), source, dtype, gpu)


def _permutes() -> None:
    for dims in ((2, 0, 1), (0, 2, 1), (2, 1, 0)):
        for source, dtype in (*((each, each) for each in DTYPES), *CASTS):
            first = dims == (2, 0, 1)
            if source != dtype and not first and (source, dtype) not in QUICK:
                continue
            order = "".join(map(str, dims))

            @case(
                f"permute 32x128x4096->{order} {label(source, dtype)}",
                PERMUTES,
                f"copy_ of a (32, 128, 4096) {short(source)} tensor, permute{dims}, into {short(dtype)}",
                HELD,
                seconds=1.0,
                compile=first and source == dtype == BF16,
                quick=first and (source, dtype) in QUICK,
            )
            def permute(tiny: bool, gpu: Device, source=source, dtype=dtype, dims=dims) -> Work:
                shape = (3, 40, 72) if tiny else (32, 128, 4096)
                return permuted(shape, dims, source, dtype, gpu)


_transposes()
_permutes()
