"""Casts of every length, phase and layout, of numbers that all devices agree on."""

from __future__ import annotations

import itertools

import pytest
import torch

import paramkit
from tests.gpu.cast_layouts import dense, layouts, others
from tests.gpu.storages import assert_as_torch, assert_same_storage, few, place, small_numbers, twin
from tests.guards import Layout
from tests.test_casts import DTYPES

PAIRS = (
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float8_e5m2, torch.float16),
    (torch.float64, torch.uint8),
    (torch.uint8, torch.float64),
    (torch.bool, torch.int64),
    (torch.int64, torch.int16),
    (torch.float8_e8m0fnu, torch.int16),
    (torch.int8, torch.float8_e4m3fnuz),
)


@pytest.mark.parametrize(("dst", "src"), PAIRS, ids=str)
def test_every_length_and_phase(device: torch.device, dst: torch.dtype, src: torch.dtype) -> None:
    """Heads and tails of every length; source and destination begin at any element of a vector."""
    phases = [*itertools.product((0, 1, 2, 3, 5, 8, 15), repeat=2)]
    source = small_numbers(dense((5000,), src, device))
    for count in (*range(40), 255, 256, 257, 1029, 4099):
        pairs = []
        for to, at in phases if count < 300 else phases[::5]:
            layout = Layout((count,), (1,), 64 + to, count + 192)
            pairs.append(
                (f"{count} from {at} to {to}", place(layout, dst, device), source[at : at + count])
            )
        assert_as_torch(pairs, "phases")


@pytest.mark.parametrize("src", DTYPES, ids=str)
def test_layouts_of_every_cast(device: torch.device, src: torch.dtype) -> None:
    """All of them in one launch, and one by one."""
    for dst in few(others(src), device, 6):
        assert_as_torch(layouts(dst, src, device), "a list")
        with paramkit.backend.trace() as trace:
            for name, got, source in layouts(dst, src, device):
                want = twin(got)
                want.copy_(source)
                paramkit.copy_(got, source)
                assert_same_storage(got, want, f"{name}, {src} -> {dst}", any_nan=True)
        assert trace.casts == 13
