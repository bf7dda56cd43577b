"""Random lists on the emulated device: any dtypes, casts, strides and ranks, as launches, transfers and plans."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import pytest
from torch import Tensor

import paramkit
from tests import cases
from tests.conftest import EMULATED, emulated, need_extension
from tests.guards import (
    assert_same_storage,
    place,
    random_layout,
    random_shape,
    random_source,
    storage_bytes,
)

SEED = int(os.environ.get("PARAMKIT_TEST_SEED", "0"))
REAL = [dtype for dtype in cases.DTYPES if not dtype.is_complex]


def random_pair(rng: random.Random, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two equal destinations in storages of pattern, and a source that broadcasts to them."""
    shape = random_shape(rng)
    layout, dtype = random_layout(rng, shape), rng.choice(cases.DTYPES)
    source = place(random_source(rng, shape), dtype, seed=seed)
    if rng.random() < 0.5 and not dtype.is_complex:  # a cast, of values that every dtype has
        dtype, source = rng.choice(REAL), cases.values(source.shape, rng.choice(REAL))
        if rng.random() < 0.5 and source.dim() > 1:
            order = tuple(reversed(range(source.dim())))
            source = cases.values(source.shape[::-1], source.dtype).permute(order)
    return place(layout, dtype), place(layout, dtype), source


def one_random_list(library: Path, how: str, seed: int) -> None:
    """One list through foreach_copy_, now and then through a plan too; PARAMKIT_TEST_SEED=seed runs it first."""
    rng = random.Random(seed)
    triples = [random_pair(rng, i) for i in range(rng.choice((1, 3, 37, 120)))]
    got, want, srcs = (list(each) for each in zip(*triples, strict=True))
    again = rng.random() < 0.2
    with emulated(library, how):
        for turn in range(2 if again else 1):
            for raw in map(storage_bytes, (*got, *want)) if turn else ():
                raw.fill_(1)
            for dst, src in zip(want, srcs, strict=True):
                dst.copy_(src)
            if turn:
                paramkit.plan(got, srcs).apply()
            else:
                paramkit.foreach_copy_(got, srcs)
            for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
                what = f"{how}, turn {turn}, PARAMKIT_TEST_SEED={seed}, pair {i} of {srcs[i].dtype}"
                assert_same_storage(ours, theirs, what)


@pytest.mark.parametrize("how", EMULATED.values())
def test_random_lists(emulator: Path, how: str) -> None:
    need_extension()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of complex numbers
        for seed in range(SEED, SEED + 150):
            one_random_list(emulator, how, seed)


@pytest.mark.slow
@pytest.mark.parametrize("how", EMULATED.values())
def test_many_random_lists(emulator: Path, how: str) -> None:
    need_extension()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(SEED + 150, SEED + 10_000):
            one_random_list(emulator, how, seed)
