"""Writes cut into pieces that read no more than so many bytes of their source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .destinations import memory_key
from .resolve import Write
from .sources.lazy import Lazy

__all__ = ["cut", "read_view", "same_memory", "source_view", "span", "views"]


def span(write: Write, itemsize: int) -> tuple[int, int]:
    """The bytes of the source, from the first that a write reads to behind the last.

    >>> span(Write(0, 0, (2, 3), (3, 1), 0, (5, 1), 10), 4)
    (40, 72)
    """
    if 0 in write.sizes:
        return 0, 0
    begin = write.src_offset * itemsize
    reach = 1 + sum((n - 1) * st for n, st in zip(write.sizes, write.src_strides, strict=True))
    return begin, begin + reach * itemsize


def cut(write: Write, itemsize: int, limit: int) -> Iterator[Write]:
    """The write as pieces, each reading a span of at most `limit` bytes or one element.

    The loop that reaches farthest in the source is halved, again and again: writes that read the same
    tensor side by side (the parts of a fused parameter) are then cut at the same places.

    >>> whole = Write(0, 0, (4, 2), (2, 1), 0, (2, 1), 0)
    >>> [(p.sizes, p.dst_offset, p.src_offset) for p in cut(whole, 4, 16)]
    [((2, 2), 0, 0), ((2, 2), 4, 4)]
    """
    begin, end = span(write, itemsize)
    if end - begin <= limit:
        yield write
        return
    reaches = [(n - 1) * st for n, st in zip(write.sizes, write.src_strides, strict=True)]
    axis = max(range(len(reaches)), key=reaches.__getitem__)
    if reaches[axis] == 0:
        yield write
        return
    half = write.sizes[axis] // 2
    for first, count in ((0, half), (half, write.sizes[axis] - half)):
        yield from cut(_narrowed(write, axis, first, count), itemsize, limit)


def same_memory(sources: Sequence[Any], a: Write, b: Write) -> bool:
    """Whether two writes read the very same elements."""
    alike = (a.sizes, a.src_strides, a.src_offset) == (b.sizes, b.src_strides, b.src_offset)
    return alike and memory_key(sources[a.src]) == memory_key(sources[b.src])


def source_view(source: Tensor, write: Write) -> Tensor:
    """The view of a tensor in memory that a write reads."""
    source = source.detach()
    return source.as_strided(
        write.sizes, write.src_strides, source.storage_offset() + write.src_offset
    )


def read_view(source: Lazy, write: Write) -> Tensor:
    """The view that a write reads of a lazy tensor, its span read into new memory."""
    size = source.element_size()
    begin, end = span(write, size)
    raw = torch.empty(end - begin, dtype=torch.uint8)
    if end > begin:
        source.read_into(begin, end, raw)
    return raw.view(source.dtype).as_strided(write.sizes, write.src_strides, 0)


def views(sources: Sequence[Any], writes: Sequence[Write], limit: int) -> Iterator[list[Tensor]]:
    """What several writes of the same sizes read, piece by piece side by side.

    Args:
        sources: one for each write, in memory or lazy.
        writes: of equal sizes.
        limit: bytes that a piece of a lazy source may span.

    Yields:
        One view for each write, of the same part. Of sources in memory alone, one piece.
    """
    if not any(isinstance(source, Lazy) for source in sources):
        yield [source_view(source, write) for source, write in zip(sources, writes, strict=True)]
        return
    for parts in _cut_together(sources, list(writes), limit):
        yield [
            read_view(source, part) if isinstance(source, Lazy) else source_view(source, part)
            for source, part in zip(sources, parts, strict=True)
        ]


def _cut_together(sources: Sequence[Any], writes: list[Write], limit: int) -> Iterator[list[Write]]:
    """Writes of the same sizes halved at the same places, until no lazy source spans more than `limit` bytes."""
    axis = None
    for source, write in zip(sources, writes, strict=True):
        if not isinstance(source, Lazy):
            continue
        begin, end = span(write, source.element_size())
        reaches = [(n - 1) * st for n, st in zip(write.sizes, write.src_strides, strict=True)]
        if end - begin > limit and max(reaches, default=0) > 0:
            axis = max(range(len(reaches)), key=reaches.__getitem__)
            break
    if axis is None:
        yield writes
        return
    n = writes[0].sizes[axis]
    for first, count in ((0, n // 2), (n // 2, n - n // 2)):
        yield from _cut_together(sources, [_narrowed(w, axis, first, count) for w in writes], limit)


def _narrowed(write: Write, axis: int, first: int, count: int) -> Write:
    """`count` turns of one loop of a write, from `first` on."""
    return replace(
        write,
        sizes=(*write.sizes[:axis], count, *write.sizes[axis + 1 :]),
        dst_offset=write.dst_offset + first * write.dst_strides[axis],
        src_offset=write.src_offset + first * write.src_strides[axis],
    )
