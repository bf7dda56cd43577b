"""Permuted copies: dense and pitched, in three widths of element, and with a cast in the same pass."""

from __future__ import annotations

import torch

from tests import cases as inputs

from .calls import copy
from .registry import Work, case, group, targets

PERMUTES = group("permutes", "Permuted copies", mean=8.0)
CASTS = group("permutes with a cast", "Permuted copies with a cast in the same pass")

SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((4096, 4096), (1, 0)),
    ((32, 128, 4096), (1, 0, 2)),
    ((32, 128, 4096), (2, 0, 1)),
    ((64, 64, 64, 64), (3, 2, 1, 0)),
    ((1024, 64, 7, 7), (0, 2, 3, 1)),
    ((8, 4096, 512), (0, 2, 1)),
)
SHARES = ((torch.float32, 0.7), (torch.bfloat16, 0.7), (torch.uint8, 0.65))
PAIRS = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float8_e4m3fn, torch.bfloat16),
)


def short(dtype: torch.dtype) -> str:
    """ "float32" and so on."""
    return str(dtype).removeprefix("torch.")


def _label(shape: tuple[int, ...], dims: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) + "->" + "".join(map(str, dims))


def _sized(shape: tuple[int, ...], tiny: bool) -> tuple[int, ...]:
    return tuple(min(size, 20) for size in shape) if tiny else shape


def _dense() -> None:
    for shape, dims in SHAPES:
        for dtype, share in SHARES:

            @case(
                f"permute {_label(shape, dims)} {short(dtype)}",
                PERMUTES,
                f"copy_ of a {shape} {short(dtype)} tensor, permute{dims}",
                targets(limit=share),
            )
            def permute(tiny: bool, shape=shape, dims=dims, dtype=dtype) -> Work:
                return copy(*inputs.permuted(_sized(shape, tiny), dims, dtype, inputs.tiled))


def _pitched() -> None:
    where = {"src": "source", "dst": "destination", "both": "both"}
    for sides, text in where.items():
        for dtype, share in SHARES:

            @case(
                f"permute pitched {text} {short(dtype)}",
                PERMUTES,
                f"4096x4096->10, {text} 64 elements apart from the ends of longer rows",
                targets(limit=share),
            )
            def pitched(tiny: bool, sides=sides, dtype=dtype) -> Work:
                pair = inputs.pitched(
                    _sized((4096, 4096), tiny),
                    (1, 0),
                    dtype,
                    inputs.tiled,
                    sides=sides,
                    margin=3 if tiny else 64,
                )
                return copy(*pair)


def _with_cast() -> None:
    for shape, dims in (SHAPES[0], SHAPES[2], SHAPES[4]):
        for source, dtype in PAIRS:

            @case(
                f"permute {_label(shape, dims)} {short(source)}->{short(dtype)}",
                CASTS,
                f"copy_ of a {shape} {short(source)} tensor, permute{dims}, to {short(dtype)}",
                targets(8, limit=0.6),
            )
            def permute(tiny: bool, shape=shape, dims=dims, source=source, dtype=dtype) -> Work:
                return permute_cast(_sized(shape, tiny), dims, source, dtype)


def permute_cast(
    shape: tuple[int, ...], dims: tuple[int, ...], source: torch.dtype, dtype: torch.dtype
) -> Work:
    """A dense `shape` of `source` seen through `dims`, into a dense tensor of `dtype`."""
    view = inputs.tiled(shape, source).permute(dims)
    return copy(torch.zeros(view.shape, dtype=torch.float32).to(dtype), view)


_dense()
_pitched()
_with_cast()
