"""Whole tensors, some at a time, in memory that is used again: for engines that load weights themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Description

__all__ = ["Bucket", "Buckets", "Entry"]

_ALIGN = 64


class Entry(NamedTuple):
    """A tensor in a bucket.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        shape: in elements.
        offset: in bytes, from the begin of the bucket.

    Example:
        >>> Entry("w", torch.float32, (2, 3), 0).offset
        0
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Bucket(NamedTuple):
    """Whole tensors one behind the other.

    Attributes:
        buffer: shape [bytes], uint8. It is used again for the next bucket.
        entries: what lies where in it.

    Example:
        >>> bucket = Bucket(torch.zeros(8, dtype=torch.uint8), (Entry("w", torch.float32, (2,), 0),))
        >>> list(bucket.tensors())
        [('w', tensor([0., 0.]))]
    """

    buffer: Tensor
    entries: tuple[Entry, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors, by name; never raises.

        Yields:
            Names and views of the buffer, of the entries' dtypes and shapes.
        """
        for name, dtype, shape, offset in self.entries:
            size = prod(shape) * dtype.itemsize
            yield name, self.buffer[offset : offset + size].view(dtype).view(shape)


class Buckets:
    """Which tensors come together; the same on all ranks.

    Args:
        description: of the tensors.
        order: their numbers, in the order in which they are given out.
        limit: bytes of a bucket; a larger tensor has one of its own.

    Attributes:
        numbers: of the tensors of each bucket.
        entries: where they lie.
    """

    def __init__(self, description: Description, order: Iterable[int], limit: int) -> None:
        self.numbers: list[list[int]] = []
        self.entries: list[tuple[Entry, ...]] = []
        self._sizes: list[int] = []
        entries: list[Entry] = []
        at = 0
        for k in order:
            dtype, shape = description.dtypes[k], description.shapes[k]
            size = prod(shape) * dtype.itemsize
            if not self.numbers or at + size > limit:
                if entries:
                    self.entries.append(tuple(entries))
                self.numbers.append([])
                self._sizes.append(0)
                entries, at = [], 0
            self.numbers[-1].append(k)
            entries.append(Entry(description.names[k], dtype, shape, at))
            self._sizes[-1] = at + size
            at += -(-size // _ALIGN) * _ALIGN
        if entries:
            self.entries.append(tuple(entries))
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.numbers)

    def allocate(self, device: torch.device | str) -> dict[int, Tensor]:
        """Make the memory, of the largest bucket, and all tensors as views of it, by number."""
        size = max(self._sizes, default=0)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return {
            number: tensor
            for k, numbers in enumerate(self.numbers)
            for number, (_, tensor) in zip(numbers, self[k].tensors(), strict=True)
        }

    def __getitem__(self, k: int) -> Bucket:
        return Bucket(self._buffer[: self._sizes[k]], self.entries[k])
