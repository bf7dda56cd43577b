"""Inputs shared by the tests and the benchmarks: values, pairs of views by layout, small models.

The tests call these builders with small sizes, the benchmarks with large ones, so that what is
timed is what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "COMPLEX",
    "DTYPES",
    "FLOAT8",
    "INTEGERS",
    "LAYOUTS",
    "centre_views",
    "column_slice",
    "contiguous",
    "conv_weights",
    "convolutions",
    "encoder",
    "every_other_row",
    "grouped_query",
    "permuted",
    "pitched",
    "random_bits",
    "row_slice",
    "small_tensors",
    "tiled",
    "transposed",
    "values",
    "vocabulary",
]

FLOATS: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8: tuple[torch.dtype, ...] = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
INTEGERS: tuple[torch.dtype, ...] = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
COMPLEX: tuple[torch.dtype, ...] = (torch.complex32, torch.complex64, torch.complex128)
DTYPES: tuple[torch.dtype, ...] = FLOATS + FLOAT8 + INTEGERS + (torch.bool,) + COMPLEX

Pair = tuple[Tensor, Tensor]


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A contiguous CPU tensor of random bytes: every NaN payload, denormal and sign turns up.

    Booleans are 0 or 1, the only bytes that a bool tensor may hold.
    """
    generator = torch.Generator().manual_seed(seed)
    result = torch.empty(tuple(shape), dtype=dtype)
    raw = torch.empty(0, dtype=torch.uint8).set_(result.untyped_storage())
    if dtype == torch.bool:
        raw.copy_(torch.randint(0, 2, raw.shape, generator=generator, dtype=torch.uint8))
    else:
        raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
    return result


def values(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A contiguous CPU tensor of small whole numbers (1 to 8) that every dtype can hold or round.

    Such values are in range for every conversion, so any two backends must agree on every bit.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 9, tuple(shape), generator=generator).to(torch.float32)
    return numbers.to(dtype)


def tiled(shape: Sequence[int], dtype: torch.dtype, seed: int = 0, period: int = 65521) -> Tensor:
    """As `values`, but the same `period` numbers again and again: quick to make when it is large."""
    size = math.prod(shape)
    if not size:
        return values(shape, dtype, seed)
    pattern = values((min(size, period),), dtype, seed)
    raw = pattern.view(torch.uint8)
    result = torch.empty(size, dtype=dtype)
    to = result.view(torch.uint8)
    whole = to.numel() // raw.numel() * raw.numel()
    to[:whole].view(-1, raw.numel()).copy_(raw)
    to[whole:].copy_(raw[: to.numel() - whole])
    return result.view(tuple(shape))


# Layouts: each gives (destination, source) of equal shape; `make` fills the sources.


def contiguous(numel: int, dtype: torch.dtype, make: Callable[..., Tensor] = values) -> Pair:
    """Both sides dense: dst ``[numel]``, src ``[numel]``."""
    return torch.zeros(numel, dtype=torch.float32).to(dtype), make((numel,), dtype)


def transposed(
    rows: int, cols: int, dtype: torch.dtype, make: Callable[..., Tensor] = values
) -> Pair:
    """dst ``[cols, rows]`` dense, src the transpose of a dense ``[rows, cols]``."""
    return torch.zeros(cols, rows, dtype=torch.float32).to(dtype), make((rows, cols), dtype).t()


def permuted(
    shape: Sequence[int],
    dims: Sequence[int],
    dtype: torch.dtype,
    make: Callable[..., Tensor] = values,
) -> Pair:
    """dst dense in the permuted shape, src a dense ``shape`` seen through ``permute(dims)``."""
    source = make(shape, dtype).permute(tuple(dims))
    return torch.zeros(source.shape, dtype=torch.float32).to(dtype), source


def pitched(
    shape: Sequence[int],
    dims: Sequence[int],
    dtype: torch.dtype,
    make: Callable[..., Tensor] = values,
    *,
    sides: str,
    margin: int = 64,
) -> Pair:
    """As `permuted`, with rows that lie apart: `sides` names "src", "dst" or "both".

    A pitched source leaves out `margin` elements at both ends of its rows; a pitched destination
    lies between as many in a wider buffer.
    """
    source = make(shape, dtype)
    if sides in ("src", "both"):
        source = source[..., margin : shape[-1] - margin]
    source = source.permute(tuple(dims))
    if sides == "src":
        return torch.zeros(source.shape, dtype=torch.float32).to(dtype), source
    *outer, last = source.shape
    whole = torch.zeros(*outer, last + 2 * margin, dtype=torch.float32).to(dtype)
    return whole[..., margin : margin + last], source


def row_slice(
    rows: int, width: int, dtype: torch.dtype, make: Callable[..., Tensor] = values
) -> Pair:
    """dst the middle half of the rows of ``[2 * rows, width]``: one contiguous run."""
    first = rows // 2
    whole = torch.zeros(2 * rows, width, dtype=torch.float32).to(dtype)
    return whole[first : first + rows], make((rows, width), dtype)


def column_slice(
    rows: int, width: int, dtype: torch.dtype, make: Callable[..., Tensor] = values
) -> Pair:
    """dst ``width`` columns inside rows four times as wide: contiguous rows, strided."""
    whole = torch.zeros(rows, 4 * width, dtype=torch.float32).to(dtype)
    return whole[:, width : 2 * width], make((rows, width), dtype)


def every_other_row(
    rows: int, width: int, dtype: torch.dtype, make: Callable[..., Tensor] = values
) -> Pair:
    """dst rows 0, 2, 4, ... of ``[2 * rows, width]``."""
    whole = torch.zeros(2 * rows, width, dtype=torch.float32).to(dtype)
    return whole[::2], make((rows, width), dtype)


def grouped_query(
    groups: int,
    repeat: int,
    head: int,
    width: int,
    dtype: torch.dtype,
    make: Callable[..., Tensor] = values,
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k and v of grouped-query attention into one fused weight, group by group.

    dsts are views ``[groups, n * head, width]`` of a fused ``[groups, repeat + 2, head, width]``, with
    n of `repeat`, 1 and 1: ``"(g r d) e -> (g s d) e"``. srcs are dense, as checkpoints hold them.
    """
    fused = torch.zeros(groups, (repeat + 2) * head, width, dtype=torch.float32).to(dtype)
    dsts, srcs, first = [], [], 0
    for seed, count in enumerate((repeat, 1, 1)):
        rows = count * head
        dsts.append(fused[:, first : first + rows])
        srcs.append(make((groups * rows, width), dtype, seed).view(groups, rows, width))
        first += rows
    return dsts, srcs


def vocabulary(
    rows: int, width: int, dtype: torch.dtype, make: Callable[..., Tensor] = values
) -> Pair:
    """The rows of a smaller embedding into the first rows of one a quarter larger."""
    whole = torch.zeros(rows + rows // 4, width, dtype=torch.float32).to(dtype)
    return whole[:rows], make((rows, width), dtype)


LAYOUTS: dict[str, Callable[[torch.dtype, Callable[..., Tensor]], Pair]] = {
    "contiguous": lambda dtype, make: contiguous(1000, dtype, make),
    "transposed": lambda dtype, make: transposed(67, 93, dtype, make),
    "permuted": lambda dtype, make: permuted((5, 17, 33), (2, 0, 1), dtype, make),
    "row_slice": lambda dtype, make: row_slice(10, 37, dtype, make),
    "column_slice": lambda dtype, make: column_slice(13, 37, dtype, make),
    "every_other_row": lambda dtype, make: every_other_row(9, 70, dtype, make),
}
"""Small pairs by name: ``LAYOUTS[name](dtype, values | random_bits)``."""


def small_tensors(
    count: int,
    numel: int,
    dst_dtype: torch.dtype = torch.float32,
    src_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """``count`` destinations and sources of ``numel`` elements, each with a storage of its own."""
    dsts = [torch.zeros(numel, dtype=torch.float32).to(dst_dtype) for _ in range(count)]
    srcs = [values((numel,), src_dtype or dst_dtype, seed) for seed in range(count)]
    return dsts, srcs


def conv_weights(count: int, shape: Sequence[int] = (8, 8, 3, 3)) -> list[Tensor]:
    """``count`` float32 convolution weights ``[out, in, 3, 3]``."""
    return [torch.zeros(tuple(shape)) for _ in range(count)]


def centre_views(weights: Sequence[Tensor]) -> list[Tensor]:
    """The centre tap of each weight: the views ``w[:, :, 1:2, 1:2]``."""
    return [weight[:, :, 1:2, 1:2] for weight in weights]


def encoder(layers: int, width: int = 8) -> nn.TransformerEncoder:
    """A stock transformer encoder of 12 parameters a layer, nested as real models are."""
    layer = nn.TransformerEncoderLayer(
        d_model=width, nhead=2, dim_feedforward=2 * width, batch_first=True
    )
    return nn.TransformerEncoder(layer, num_layers=layers, enable_nested_tensor=False)


def convolutions(stages: int, blocks: int, width: int = 4) -> nn.ModuleList:
    """``stages * blocks`` convolutions ``[width, width, 3, 3]`` without bias, two levels deep."""
    return nn.ModuleList(
        nn.ModuleList(nn.Conv2d(width, width, 3, bias=False) for _ in range(blocks))
        for _ in range(stages)
    )
