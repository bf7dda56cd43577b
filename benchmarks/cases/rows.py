"""Runs of whole rows: slices, every other row, grouped-query interleave, vocabulary overlap.

Once 4096 wide and 128 MiB and more, beyond what caches hold, where torch is near what the memory can do, so
the other measure is a plain copy of as many bytes; and once in lists of 1000 small ones against the loop
that people write.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests import cases as inputs

from .calls import copy, loop
from .registry import Work, case, group, targets

WIDE = group("wide rows", "Rows of 4096 float32")
LISTS = group("row lists", "The same in lists of 1000 small ones")

F32 = torch.float32
LARGE = targets(ceiling=0.85)
MANY = targets(6)


@case("row slice", WIDE, "16384 rows in the middle of a weight of 32768 x 4096", LARGE)
def row_slice(tiny: bool) -> Work:
    return copy(*inputs.row_slice(8 if tiny else 16384, 4096, F32, inputs.tiled))


@case("column slice", WIDE, "4096 columns inside 8192 rows of 16384", LARGE)
def column_slice(tiny: bool) -> Work:
    return copy(*inputs.column_slice(8 if tiny else 8192, 4096, F32, inputs.tiled))


@case("every other row", WIDE, "rows ::2 of a weight of 32768 x 4096", LARGE)
def every_other_row(tiny: bool) -> Work:
    return copy(*inputs.every_other_row(8 if tiny else 16384, 4096, F32, inputs.tiled))


@case("GQA interleave", WIDE, "q, k, v of 40 groups of 4 heads of 64 into a fused weight", LARGE)
def grouped_query(tiny: bool) -> Work:
    groups, head = (2, 2) if tiny else (40, 64)
    return loop(*inputs.grouped_query(groups, 4, head, 4096, F32, inputs.tiled))


@case("vocabulary overlap", WIDE, "an embedding of 16000 rows into one of 20000", LARGE)
def vocabulary(tiny: bool) -> Work:
    return copy(*inputs.vocabulary(8 if tiny else 16000, 4096, F32, inputs.tiled))


# Lists: rows of 16, 32, 48 and 64 elements in turn.

WIDTHS = (16, 32, 48, 64)


def _small(make: Callable[[int, int, torch.dtype], inputs.Pair], tiny: bool) -> Work:
    pairs = [make(4, WIDTHS[number % 4], F32) for number in range(8 if tiny else 1000)]
    return loop([dst for dst, _ in pairs], [src for _, src in pairs])


def _lists() -> None:
    for name, make in (
        ("row slice", inputs.row_slice),
        ("column slice", inputs.column_slice),
        ("every other row", inputs.every_other_row),
        ("vocabulary overlap", inputs.vocabulary),
    ):

        @case(
            f"{name} x1000",
            LISTS,
            f"{name} of 1000 weights, 4 rows of 16-64 elements, foreach_copy_ against the loop",
            MANY,
        )
        def listed(tiny: bool, make=make) -> Work:
            return _small(make, tiny)


_lists()


@case(
    "GQA interleave x1000",
    LISTS,
    "1000 writes of q, k, v into fused weights, rows of 16-64 elements, against the loop",
    MANY,
)
def grouped_queries(tiny: bool) -> Work:
    dsts: list[Tensor] = []
    srcs: list[Tensor] = []
    count = 9 if tiny else 1000
    for number in range((count + 2) // 3):
        made = inputs.grouped_query(2, 2, 2, WIDTHS[number % 4], F32)
        dsts += made[0]
        srcs += made[1]
    return loop(dsts[:count], srcs[:count])
