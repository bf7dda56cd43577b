"""Sums of messages and parameters: what changes a value changes the sum, what does not does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import paramkit.distributed.checksum as module
from paramkit.distributed.checksum import checksum
from tests.guards import Layout, place

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def values(dtype: torch.dtype, shape: tuple[int, ...] = (5, 7), seed: int = 1) -> Tensor:
    """Random values, no NaN among them, that lie dense."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_changed_bit_and_every_swap_is_seen(dtype: torch.dtype) -> None:
    base = values(dtype, (11,))
    before = checksum(base)
    raw = base.view(torch.uint8)
    seen = 0
    for byte in range(raw.numel()):
        for bit in range(8) if dtype != torch.bool else (0,):
            raw[byte] ^= 1 << bit
            numbers = torch.view_as_real(base) if dtype.is_complex else base
            wide = numbers.double() if dtype.is_floating_point or dtype.is_complex else numbers
            if not (wide != wide).any():  # NaNs count as one
                assert checksum(base) != before, (byte, bit)
                seen += 1
            raw[byte] ^= 1 << bit
    assert seen >= raw.numel()
    assert checksum(base) == before
    distinct = torch.arange(11).to(dtype)
    swapped = distinct.clone()
    swapped[3], swapped[8] = distinct[0], distinct[1]
    assert checksum(swapped) != checksum(distinct) or dtype == torch.bool


def test_zeros_of_either_sign_differ_and_every_nan_is_one() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    quiet = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert len({checksum(quiet[k : k + 1]) for k in range(3)}) == 1
    assert checksum(quiet) == checksum(torch.full((3,), float("nan")))
    assert checksum(quiet, torch.bfloat16) == checksum(torch.full((3,), float("nan")).bfloat16())


def test_a_lost_or_added_tail_is_seen() -> None:
    base = values(torch.float32, (9,)) + 100
    assert checksum(base[:8]) != checksum(base) != checksum(torch.cat([base, base[:1]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    base = values(dtype)
    wide = place(Layout.dense((5, 7), (2, 11)), dtype)
    wide.copy_(base)
    assert checksum(wide) == checksum(base)
    assert checksum(base.t()) == checksum(base.t().contiguous())
    assert checksum(base.t()) != checksum(base)


@pytest.mark.parametrize("src", [torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("dst", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_a_sum_before_and_after_a_conversion(src: torch.dtype, dst: torch.dtype) -> None:
    base = values(src, (300,))
    assert checksum(base, dst) == checksum(base.to(dst))


def test_what_is_conjugate_or_scalar_or_empty() -> None:
    base = values(torch.complex64)
    assert checksum(base.conj()) == checksum(base.conj().resolve_conj()) != checksum(base)
    assert checksum(torch.tensor(3.0)) == checksum(torch.tensor([3.0])) != 0
    assert checksum(torch.empty(0, 4)) == 0
    assert checksum(torch.nn.Parameter(torch.ones(2))) == checksum(torch.ones(2))


def test_chunks_give_the_sum_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    base = values(torch.float32, (1000,))
    whole = checksum(base)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert checksum(base) == whole
    assert -(1 << 63) <= whole < 1 << 63
