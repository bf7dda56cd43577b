"""Writes cut into pieces that read no more than so many bytes of their source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .resolve import Write
from .sources.lazy import Lazy

__all__ = ["cut", "read_view", "source_view", "span", "views"]


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
    n = write.sizes[axis]
    half = n // 2
    for first, count in ((0, half), (half, n - half)):
        sizes = (*write.sizes[:axis], count, *write.sizes[axis + 1 :])
        yield from cut(
            replace(
                write,
                sizes=sizes,
                dst_offset=write.dst_offset + first * write.dst_strides[axis],
                src_offset=write.src_offset + first * write.src_strides[axis],
            ),
            itemsize,
            limit,
        )


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
    # The first lazy one decides where to cut; the others may span more, by their own strides.
    lead = next(k for k, source in enumerate(sources) if isinstance(source, Lazy))
    for piece in cut(writes[lead], sources[lead].element_size(), limit):
        start = _start(piece, writes[lead])
        out = []
        for source, write in zip(sources, writes, strict=True):
            offset = sum(i * st for i, st in zip(start, write.src_strides, strict=True))
            part = replace(write, sizes=piece.sizes, src_offset=write.src_offset + offset)
            out.append(
                read_view(source, part) if isinstance(source, Lazy) else source_view(source, part)
            )
        yield out


def _start(piece: Write, whole: Write) -> tuple[int, ...]:
    """The index in `whole` at which a piece of it begins."""
    left = piece.dst_offset - whole.dst_offset
    start = [0] * len(whole.sizes)
    for axis in sorted(range(len(start)), key=lambda k: -whole.dst_strides[k]):
        stride = whole.dst_strides[axis]
        if stride and whole.sizes[axis] > 1:
            start[axis], left = divmod(left, stride)
    return tuple(start)


def elements(write: Write) -> int:
    """How many elements a write writes."""
    return prod(write.sizes)
