"""Tensors of a device to be copied: the layouts of `tests.cases`, made where they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tests import cases

from .device import Device

__all__ = ["apart", "made_on", "numbers", "sets_beyond_cache", "zeros"]

PERIOD = 65521


def numbers(shape: Sequence[int], dtype: torch.dtype, where: torch.device) -> Tensor:
    """A contiguous tensor of whole numbers from 1 to 8, `PERIOD` of them again and again.

    Every dtype holds them, so the bits of both sides of a conversion must be equal.
    """
    size = math.prod(shape)
    with torch.device("cpu"):  # the generator is the CPU's
        pattern = cases.values((min(size, PERIOD),), dtype).view(torch.uint8)
    raw = pattern.to(where)
    result = torch.empty(size, dtype=dtype, device=where)
    to = result.view(torch.uint8)
    whole = to.numel() // raw.numel() * raw.numel()
    to[:whole].view(-1, raw.numel()).copy_(raw)
    to[whole:].copy_(raw[: to.numel() - whole])
    return result.view(tuple(shape))


def zeros(shape: Sequence[int], dtype: torch.dtype, where: torch.device) -> Tensor:
    """Zeros; every page is there before the clock starts."""
    result = torch.empty(tuple(shape), dtype=dtype, device=where)
    result.view(torch.uint8).zero_()
    return result


@contextmanager
def made_on(gpu: Device) -> Iterator[Callable[[Sequence[int], torch.dtype], Tensor]]:
    """The layouts of `tests.cases` make their tensors on the device; the value is their `make`."""
    with gpu.where:
        yield lambda shape, dtype: numbers(shape, dtype, gpu.where)


def apart(count: int, numel: int, dtype: torch.dtype, where: torch.device) -> list[Tensor]:
    """`count` tensors of `numel` numbers, each with a storage of its own."""
    return [piece.clone() for piece in numbers((count * numel,), dtype, where).split(numel)]


def sets_beyond_cache(bytes: int, gpu: Device, most: int = 8) -> int:
    """How many sets of so many bytes, taken in turn, find nothing of themselves in the cache."""
    return max(1, min(most, math.ceil(4 * gpu.cache / bytes)))
