"""Which dtypes a list converts between, and the numbers in them: those for which torch has one answer.

A NaN becomes some NaN, and what an integer cannot hold becomes one of two numbers, by the path that torch takes
(docs/semantics.md). Lists that convert hold none of these, so that every byte can be compared. All of them,
NaNs included, are in lists that only move.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from tests.cases import COMPLEX, DTYPES, FLOAT8, INTEGERS

__all__ = ["KINDS", "POOL", "Kind", "pool"]

POOL = 1 << 13
"""Elements of each pool of numbers."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SCALES = torch.float8_e8m0fnu
SMALL_FLOATS = tuple(dtype for dtype in FLOAT8 if dtype != SCALES)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Kind:
    """A family of conversions: from any of `sources` to any of `destinations`."""

    name: str
    destinations: tuple[torch.dtype, ...]
    sources: tuple[torch.dtype, ...]


def _all(name: str, *dtypes: torch.dtype) -> Kind:
    return Kind(name, dtypes, dtypes)


KINDS = (
    _all("whole", *DTYPES),
    _all("signed", *FLOATS, *SMALL_FLOATS, *SIGNED, *COMPLEX),
    _all("wide", *FLOATS, torch.float8_e5m2),
    _all("narrow", *FLOATS, *SMALL_FLOATS),
    _all("bits", *INTEGERS, torch.bool),
    # What was an integer of any size stays a float: it may not fit an integer any more.
    Kind("floating", FLOATS, (*FLOATS, *INTEGERS, torch.bool)),
)


def _numbers(kind: str, rng: np.random.Generator) -> np.ndarray:
    """The pool of a kind as float64."""
    if kind == "whole":
        return rng.integers(0, 9, POOL).astype(np.float64)
    if kind == "signed":
        return rng.integers(-60, 61, POOL) / 4
    sign = rng.choice((-1.0, 1.0), POOL)
    if kind == "narrow":  # up to what every float8 holds, down to zeros of both signs
        exponents = rng.integers(-20, 7, POOL)
        return sign * np.ldexp(rng.integers(0, 17, POOL) / 16, exponents)
    exponents = rng.integers(-160, 160, POOL) // rng.choice((1, 1, 4, 16), POOL)
    numbers = sign * np.ldexp(1 + rng.random(POOL), exponents)
    numbers[rng.random(POOL) < 0.05] = np.inf
    numbers[rng.random(POOL) < 0.05] = -0.0
    return numbers


@cache
def pool(kind: str, dtype: torch.dtype) -> np.ndarray:
    """The bytes of `POOL` numbers of a dtype, the same in every process."""
    rng = np.random.default_rng([7, len(kind), DTYPES.index(dtype)])
    size = dtype.itemsize
    if kind == "bits" or (kind == "floating" and not dtype.is_floating_point):
        top = 2 if dtype == torch.bool else 256
        return rng.integers(0, top, POOL * size, dtype=np.uint8)
    numbers = torch.from_numpy(_numbers(kind, rng))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of complex32
        numbers = numbers.to(dtype)
    return numbers.view(torch.uint8).numpy().reshape(-1).copy()
