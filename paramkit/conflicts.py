"""Do two writes touch the same element? Exact for any strides, from addresses alone.

Views are laid on a map of the memory between them, one byte for each granule, the largest unit that
every view starts on, steps by and covers whole. For blocks, rows and columns a granule is a block, row
or column part, so that the map is tiny; only views interleaved element by element need a byte each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch

from .resolve import Resolved

__all__ = ["Conflict", "find_conflicts"]


@dataclass(frozen=True)
class Conflict:
    """Writes `first` and `second` (indices, equal for a write that overlaps itself) touch one element.

    `kind` is "write" when both write it, and "read" when `second` reads what `first` writes.
    """

    kind: str
    first: int
    second: int


class _Region(NamedTuple):
    """The bytes of a view: loops (size, stride in bytes), outermost first, around a contiguous run."""

    device: str
    begin: int
    end: int
    loops: tuple[tuple[int, int], ...]
    run: int
    write: int
    reads: bool
    in_place: bool  # the write copies a view onto itself: its read is harmless

    @property
    def injective(self) -> bool:
        reach = self.run
        for size, stride in reversed(self.loops):
            if stride < reach:
                return False
            reach += (size - 1) * stride
        return True


def find_conflicts(resolved: Resolved) -> list[Conflict]:
    """Every write that overlaps an earlier one or itself, and every read of what another write writes.

    A write that copies a view onto itself is none. Tensors without strided memory are left out.
    """
    regions = sorted(_regions(resolved), key=lambda r: (r.device, r.begin))
    found: list[Conflict] = []
    for cluster in _clusters(regions):
        writers = [r for r in cluster if not r.reads]
        readers = [r for r in cluster if r.reads]
        if not writers or (len(writers) == 1 and not readers and writers[0].injective):
            continue
        found += _examine(writers, readers)
    return sorted(found, key=lambda c: (c.second, c.first, c.kind))


def _regions(resolved: Resolved) -> Iterable[_Region]:
    for i, w in enumerate(resolved.writes):
        dst, src = resolved.destinations[w.dst].tensor, resolved.source_tensors[w.src]
        if 0 in w.sizes:
            continue
        if dst.layout is not torch.strided or src.layout is not torch.strided:
            continue
        begin = dst.data_ptr() + w.dst_offset * dst.element_size()
        start = src.data_ptr() + w.src_offset * src.element_size()
        steps = zip(w.sizes, w.dst_strides, w.src_strides, strict=True)
        same = (
            begin == start and dst.dtype == src.dtype and all(d == s for n, d, s in steps if n > 1)
        )
        yield _region(dst, begin, w.sizes, w.dst_strides, i, False, same)
        yield _region(src, start, w.sizes, w.src_strides, i, True, same)


def _region(
    tensor: torch.Tensor,
    begin: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    write: int,
    reads: bool,
    in_place: bool,
) -> _Region:
    width = tensor.element_size()
    # A source may repeat an element (stride 0): for reading, once is enough.
    loops = sorted(
        (
            (n, s * width)
            for n, s in zip(sizes, strides, strict=True)
            if n > 1 and not (reads and s == 0)
        ),
        key=lambda loop: -loop[1],
    )
    run = width
    while loops and loops[-1][1] == run:
        run *= loops.pop()[0]
    end = begin + run + sum((n - 1) * s for n, s in loops)
    return _Region(str(tensor.device), begin, end, tuple(loops), run, write, reads, in_place)


def _clusters(regions: Sequence[_Region]) -> Iterable[list[_Region]]:
    """Groups whose address ranges touch; regions of two groups cannot meet."""
    cluster: list[_Region] = []
    end = 0
    for region in regions:
        if cluster and (region.device != cluster[0].device or region.begin >= end):
            yield cluster
            cluster = []
            end = 0
        cluster.append(region)
        end = max(end, region.end)
    if cluster:
        yield cluster


def _examine(writers: Sequence[_Region], readers: Sequence[_Region]) -> list[Conflict]:
    everything = [*writers, *readers]
    base = min(r.begin for r in everything)
    granule = 0
    for r in everything:
        granule = gcd(granule, r.begin - base, r.run, *(s for _, s in r.loops))
    written = torch.zeros((max(r.end for r in everything) - base) // granule, dtype=torch.uint8)

    def cells(r: _Region) -> torch.Tensor:
        sizes = [*(n for n, _ in r.loops), r.run // granule]
        strides = [*(s // granule for _, s in r.loops), 1]
        return written.as_strided(sizes, strides, (r.begin - base) // granule)

    found: list[Conflict] = []
    done: list[_Region] = []
    for r in sorted(writers, key=lambda r: r.write):
        if cells(r).any():
            found.append(Conflict("write", _culprit(r, done, written, cells), r.write))
        before = 0 if r.injective else int(torch.count_nonzero(written))
        cells(r).fill_(1)
        done.append(r)
        if not r.injective and int(torch.count_nonzero(written)) - before < cells(r).numel():
            if not (found and found[-1].second == r.write):
                found.append(Conflict("write", r.write, r.write))
    for r in readers:
        # What one write copies onto itself no other write touches, or that is a conflict found above.
        if not r.in_place and cells(r).any():
            found.append(Conflict("read", _culprit(r, done, written, cells), r.write))
    return found


def _culprit(region: _Region, writers: Iterable[_Region], written: torch.Tensor, cells) -> int:  # type: ignore[no-untyped-def]
    """The first of the writers that meets a region; `written` is left as it was."""
    kept = written.clone()
    for other in writers:
        if other.begin < region.end and region.begin < other.end:
            written.zero_()
            cells(other).fill_(1)
            if cells(region).any():
                written.copy_(kept)
                return other.write
    written.copy_(kept)
    return region.write
