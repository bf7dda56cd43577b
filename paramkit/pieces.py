"""Writes cut into pieces that read no more than so many bytes of their source, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .destinations import memory_key
from .ranges import loops, packed, ranges_of
from .resolve import Write
from .sources.lazy import Lazy, Stored, reach

__all__ = ["cut", "read_view", "same_memory", "span", "view_of", "views"]


def span(write: Write, itemsize: int) -> tuple[int, int]:
    """The bytes of the source, from the first that a write reads to behind the last.

    >>> span(Write(0, 0, (2, 3), (3, 1), 0, (5, 1), 10), 4)
    (40, 72)
    """
    begin = write.src_offset * itemsize
    return begin, begin + reach(write.sizes, write.src_strides) * itemsize


def cut(
    writes: Sequence[Write],
    itemsizes: Sequence[int],
    limit: int,
    measure: Callable[[Write, int], int] | None = None,
) -> Iterator[tuple[Write, ...]]:
    """Writes of the same sizes as pieces, each reading a span of at most `limit` bytes or one element.

    The loop that reaches farthest in the source is halved, again and again: writes that read the same
    tensor side by side (the parts of a fused parameter) are then cut at the same places.

    Args:
        writes: cut at the same places.
        itemsizes: bytes of an element of each write's source; 0 where its span does not matter.
        limit: bytes.
        measure: the bytes that count of a write whose source has elements of so many; None: those of its span.

    >>> whole = Write(0, 0, (4, 2), (2, 1), 0, (2, 1), 0)
    >>> [(p.sizes, p.dst_offset, p.src_offset) for (p,) in cut([whole], [4], 16)]
    [((2, 2), 0, 0), ((2, 2), 4, 4)]
    """
    for write, itemsize in zip(writes, itemsizes, strict=True):
        span_of = reach(write.sizes, write.src_strides) * itemsize
        if span_of <= limit or (measure is not None and measure(write, itemsize) <= limit):
            continue
        reaches = [(n - 1) * st for n, st in zip(write.sizes, write.src_strides, strict=True)]
        if max(reaches, default=0) == 0:
            continue
        axis = reaches.index(max(reaches))
        half = write.sizes[axis] // 2
        for first, count in ((0, half), (half, write.sizes[axis] - half)):
            parts = [_narrowed(w, axis, first, count) for w in writes]
            yield from cut(parts, itemsizes, limit, measure)
        return
    yield tuple(writes)


def _narrowed(write: Write, axis: int, first: int, count: int) -> Write:
    """`count` turns of one loop of a write, from `first` on."""
    return replace(
        write,
        sizes=(*write.sizes[:axis], count, *write.sizes[axis + 1 :]),
        dst_offset=write.dst_offset + first * write.dst_strides[axis],
        src_offset=write.src_offset + first * write.src_strides[axis],
    )


def same_memory(sources: Sequence[Any], a: Write, b: Write) -> bool:
    """Whether two writes read the very same elements."""
    alike = (a.sizes, a.src_strides, a.src_offset) == (b.sizes, b.src_strides, b.src_offset)
    return alike and memory_key(sources[a.src]) == memory_key(sources[b.src])


def view_of(tensor: Tensor, sizes: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
    """A detached view; the offset is relative to the tensor's first element."""
    tensor = tensor.detach()
    return tensor.as_strided(tuple(sizes), tuple(strides), tensor.storage_offset() + offset)


def read_view(source: Any, write: Write) -> Tensor:
    """What a write reads: a view of a tensor in memory, or of new memory for a lazy one."""
    if isinstance(source, Stored) and 0 not in write.sizes:
        return _read_stored(source, write)
    if isinstance(source, Lazy):
        return source.read_view(write.sizes, write.src_strides, write.src_offset)
    return view_of(source, write.sizes, write.src_strides, write.src_offset)


def _read_stored(source: Stored, write: Write) -> Tensor:
    """Without the gaps, where there are any."""
    size = source.element_size()
    made = packed([write], size) if loops(write, size)[1] else None
    if made is None or made.writes is None:
        return source.read_view(write.sizes, write.src_strides, write.src_offset)
    out = torch.empty(made.bytes, dtype=torch.uint8)
    source.file.read_many(ranges_of(source, made.rows, out))
    (view,) = made.writes
    return out.view(source.dtype).as_strided(view.sizes, view.src_strides, view.src_offset)


def views(
    sources: Sequence[Any], writes: Sequence[Write], limit: int
) -> Iterator[tuple[Tensor, ...]]:
    """What several writes of the same sizes read, piece by piece side by side.

    Args:
        sources: one for each write, in memory or lazy.
        writes: of equal sizes.
        limit: bytes that a piece of a lazy source may span. Of sources in memory alone, there is one piece.

    Yields:
        One view for each write, of the same part.
    """
    itemsizes = [s.element_size() if isinstance(s, Lazy) else 0 for s in sources]
    for parts in cut(writes, itemsizes, limit):
        yield tuple(read_view(source, part) for source, part in zip(sources, parts, strict=True))
