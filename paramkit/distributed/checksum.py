"""Sums that tell whether values arrived: of messages, and of parameters."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["checksum"]

_CHUNK = 1 << 20
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor, dtype: torch.dtype | None = None) -> int:
    """A sum of the bits of all elements, each weighted by its place, modulo 2**64.

    Swapped, lost and changed elements change it. Every NaN counts as the same one.

    Args:
        values: any shape and strides; taken in row-major order.
        dtype: what the values are converted to first.

    >>> checksum(torch.tensor([1, 2])) == checksum(torch.tensor([2, 1]))
    False
    >>> checksum(torch.tensor([1.0]), torch.bfloat16) == checksum(torch.tensor([1.0]).bfloat16())
    True
    """
    flat = values.detach().reshape(-1)
    total = 0
    for first in range(0, flat.numel(), _CHUNK):
        bits = _bits(flat[first : first + _CHUNK], dtype)
        n = len(bits)
        weights = torch.arange(first, first + n, dtype=torch.int64, device=bits.device)
        total += int((bits * (weights * 2 + 1)).sum())
    return ((total + (1 << 63)) % (1 << 64)) - (1 << 63)


def _bits(part: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The elements as 64-bit integers."""
    if dtype is not None and part.dtype != dtype:
        part = part.to(dtype)
    if part.dtype.is_complex:
        part = torch.view_as_real(part.resolve_conj()).reshape(-1)
    part = part.contiguous()
    size = part.element_size()
    bits = part.view(_INTS[size]).to(torch.int64)
    if part.dtype.is_floating_point:
        # NaN has many forms, and conversions differ in which one they give.
        wide = part if size > 1 else part.to(torch.float32)
        bits = torch.where(torch.isnan(wide), -1, bits)
    return bits
