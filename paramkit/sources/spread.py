"""Tensors in parts: shards of ranks, or chunks of a checkpoint.

Names, rules and the proof know the whole tensor, as one contiguous tensor of its global shape. Only
where writes become copies does it matter which part holds what; see `paramkit.boxes`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .lazy import Lazy

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Segment", "Spread", "SpreadPart", "whole_axes"]


class Segment(NamedTuple):
    """A run of indices of one axis: `length` of them from `start` on, held from local index `at` on."""

    start: int
    length: int
    at: int


class SpreadPart(NamedTuple):
    """A box of a tensor, or several with a grid of gaps between them, held as one local tensor.

    Attributes:
        axes: for each axis its segments, with rising starts; none for a part that is empty.
        held: a `Tensor` or `Lazy` of the local shape; None for a part that is elsewhere.
    """

    axes: tuple[tuple[Segment, ...], ...]
    held: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The local sizes."""
        return tuple(sum(s.length for s in segments) for segments in self.axes)


@lru_cache(maxsize=1 << 14)
def whole_axes(shape: tuple[int, ...]) -> tuple[tuple[Segment, ...], ...]:
    """The axes of a part that is all of a tensor.

    >>> whole_axes((2, 0))
    ((Segment(start=0, length=2, at=0),), ())
    """
    return tuple((Segment(0, n, 0),) if n else () for n in shape)


class Spread(Lazy):
    """A tensor in parts. It looks contiguous, and of the global shape.

    Args:
        shape: global sizes.
        dtype: of every part.
        parts: which box each holds; several may hold the same elements, and some may be nowhere.
        key: equal for tensors that are the same memory or the same place in a file; may be set later.
        device: of the parts.
        wrapper: the DTensor that the user sees.

    Attributes:
        checked: whether it is known that it can take part in a write.

    Example:
        >>> left = SpreadPart(((Segment(0, 1, 0),), (Segment(0, 2, 0),)), torch.tensor([[1, 2]]))
        >>> right = SpreadPart(((Segment(0, 1, 0),), (Segment(2, 1, 0),)), torch.tensor([[3]]))
        >>> Spread((1, 3), torch.int64, [left, right]).load()
        tensor([[1, 2, 3]])
    """

    __slots__ = ("checked", "device", "key", "parts", "wrapper")

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        parts: Sequence[SpreadPart],
        key: Hashable = None,
        device: torch.device | None = None,
        wrapper: Any = None,
    ) -> None:
        super().__init__(shape, dtype)
        self.parts = tuple(parts)
        self.key = key
        self.device = torch.device("cpu") if device is None else device
        self.wrapper = wrapper
        self.checked = wrapper is None

    is_meta = False

    @property
    def is_cuda(self) -> bool:
        """Whether the parts are on a GPU."""
        return self.device.type == "cuda"

    def is_here(self) -> bool:
        """Whether this process holds every element."""
        held = (part.shape for part in self.parts if part.held is not None)
        return sum(map(prod, held)) >= self.numel()

    def location(self) -> Hashable:
        return (id(self),) if self.key is None else self.key

    def read_view(self, sizes: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
        from ..boxes import pieces_within  # which knows what a part is

        out = torch.empty(tuple(sizes), dtype=self.dtype)
        done = 0
        for piece, held in pieces_within(self, sizes, strides, offset):
            sizes_, out_strides, out_offset, strides_, offset_ = piece
            view = out.as_strided(sizes_, out_strides, out_offset)
            if isinstance(held, Lazy):
                view.copy_(held.read_view(sizes_, strides_, offset_))
            else:
                held = held.detach()
                view.copy_(held.as_strided(sizes_, strides_, held.storage_offset() + offset_))
            done += view.numel()
        if done != out.numel():
            raise RuntimeError(f"{out.numel() - done} elements of {self!r} are held elsewhere")
        return out

    def read_into(self, begin: int, end: int, out: Tensor) -> None:
        self._check_range(begin, end, out)
        size = self.dtype.itemsize
        first, last = begin // size, -(-end // size)
        flat = self.read_view((last - first,), (1,), first).view(torch.uint8)
        out.copy_(flat[begin - first * size : end - first * size])

    def load(self) -> Tensor:
        return self.read_view(self.shape, self.strides, 0)
