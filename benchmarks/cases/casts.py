"""Conversions: every ordered pair of dtypes that torch can convert, contiguous.

Both sides together are 512 MiB, more than any cache holds: of 64 MiB a plain copy in memory of its own
stays in a large one, while the two sides of a case push each other out. The values are small whole
numbers, in range for every dtype, so that the bits of both sides must be equal; the tests have NaNs and
numbers out of range.
"""

from __future__ import annotations

import itertools

import torch

from tests import cases as inputs

from ..targets import GUARD, AtLeast, Condition, Either
from .calls import copy
from .registry import MIB, Work, case, group

CASTS = group("casts", "Conversions, 512 MiB read and written together")

DTYPES = inputs.FLOATS + inputs.FLOAT8 + inputs.INTEGERS + (torch.bool,)
HALVES = {torch.float16, torch.bfloat16}
CEILING = 0.85

# Every kind of conversion once or twice: the whole matrix takes minutes.
QUICK = {
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.float32, torch.float64),
    (torch.float8_e4m3fn, torch.bfloat16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float8_e5m2, torch.float32),
    (torch.float32, torch.float8_e8m0fnu),
    (torch.int32, torch.float32),
    (torch.float32, torch.int8),
    (torch.uint8, torch.float32),
    (torch.int64, torch.int32),
    (torch.uint16, torch.int16),
    (torch.float32, torch.bool),
    (torch.bool, torch.bfloat16),
}


def kind(source: torch.dtype, dtype: torch.dtype) -> tuple[str, float]:
    """The class of a pair and its target."""
    if source in inputs.FLOAT8 or dtype in inputs.FLOAT8:
        return "float8", 8.0
    if {source, dtype} == HALVES:
        return "float16 and bfloat16", 3.0
    return "other", 1.5


def held(source: torch.dtype, dtype: torch.dtype) -> tuple[Condition, ...]:
    """Never slower than torch; and as fast as promised, or as the memory allows."""
    ratio = kind(source, dtype)[1]
    return (
        AtLeast("ratio", GUARD),
        Either(AtLeast("ratio", ratio), AtLeast("ceiling", CEILING)),
    )


def _pairs() -> None:
    for source, dtype in itertools.permutations(DTYPES, 2):
        names = [str(each).removeprefix("torch.") for each in (source, dtype)]

        @case(
            f"cast {names[0]}->{names[1]}",
            CASTS,
            f"copy_ of a contiguous {names[0]} tensor into {names[1]}",
            held(source, dtype),
            seconds=1.0,
            quick=(source, dtype) in QUICK,
        )
        def cast(tiny: bool, source=source, dtype=dtype) -> Work:
            count = 1000 if tiny else 512 * MIB // (source.itemsize + dtype.itemsize)
            src = inputs.tiled((count,), source)
            dst = torch.empty(count, dtype=dtype)
            dst.view(torch.uint8).zero_()  # the pages are there before the clock starts
            work = copy(dst, src)
            work.facts.update(source=names_of(source), destination=names_of(dtype), elements=count)
            work.facts["class"] = kind(source, dtype)[0]
            return work


def names_of(dtype: torch.dtype) -> str:
    """ "float8_e4m3fn" and so on."""
    return str(dtype).removeprefix("torch.")


_pairs()
