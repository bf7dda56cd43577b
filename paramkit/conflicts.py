"""Do two writes touch the same element? Exact for any strides, from addresses alone.

Views whose address ranges are apart cannot meet, which settles nearly all of them at once. The others are laid on a
sheet of the memory under them (see `sheets`): a grid of few places, or windows of a map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .resolve import Resolved
from .sheets import Form, Placed, form_of, meetings, overlaps_itself

__all__ = ["Conflict", "find_conflicts"]


@dataclass(frozen=True)
class Conflict:
    """Writes `first` and `second` (indices, equal for a write that overlaps itself) touch one element.

    `kind` is "write" when both write it, and "read" when `second` reads what `first` writes.
    """

    kind: str
    first: int
    second: int


def find_conflicts(resolved: Resolved) -> list[Conflict]:
    """Every write that overlaps an earlier one or itself, and every read of what another write writes.

    Of several writes that a write overlaps, or reads from, the first is named. A write that copies a view onto itself
    is none. Tensors without strided memory, and sources that are not in memory yet, are left out.

    Returns:
        The conflicts, sorted by `second`, then by `first`. For n writes whose address ranges are apart that
        takes O(n log n).
    """
    views = _views(resolved)
    found: list[Conflict] = []
    for cluster in views.clusters():
        found += _examine(resolved, views, cluster)
    return sorted(found, key=lambda c: (c.second, c.first, c.kind))


@dataclass
class _Views:
    """What writes write and read, in columns; addresses in bytes.

    Attributes:
        tags: 2 * write for a destination, 2 * write + 1 for a source.
        spaces: of the devices, whose addresses have nothing to do with one another.
        folded: places in the columns of destinations that touch an element twice.
    """

    tags: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    spaces: list[int] = field(default_factory=list)
    folded: list[int] = field(default_factory=list)

    def clusters(self) -> Iterable[list[int]]:
        """Places in the columns of views that may meet: their address ranges touch, and one of them is written."""
        if not self.tags:
            return
        # Addresses may have their highest bit set.
        begins, ends = np.array(self.begins, np.uint64), np.array(self.ends, np.uint64)
        spaces = np.array(self.spaces)
        written = np.array(self.tags) % 2 == 0
        folded: NDArray[np.bool_] = np.zeros(len(written), np.bool_)
        folded[self.folded] = True
        for space in np.unique(spaces):
            own = np.flatnonzero(spaces == space)
            own = own[np.argsort(begins[own], kind="stable")]
            reach = np.maximum.accumulate(ends[own])
            starts = np.concatenate(([0], np.flatnonzero(begins[own][1:] >= reach[:-1]) + 1))
            sizes = np.diff(starts, append=len(own))
            several = (sizes > 1) & np.logical_or.reduceat(written[own], starts)
            for k in np.flatnonzero(several | np.logical_or.reduceat(folded[own], starts)):
                yield own[starts[k] : starts[k] + sizes[k]].tolist()


def _views(resolved: Resolved) -> _Views:
    """The views of all writes: this runs once a write, before anything is known to be wrong."""
    views = _Views()
    # Bound once: there may be tens of thousands of writes.
    tag, begins, ends = views.tags.append, views.begins.append, views.ends.append
    form_at, space_at, strided = views.forms.append, views.spaces.append, torch.strided
    destinations, sources = resolved.destinations, resolved.source_tensors
    devices: dict[str, int] = {}
    unreal: dict[int, int] = {}
    for i, w in enumerate(resolved.writes):
        sizes = w.sizes
        for kind, tensor, strides, offset in (
            (0, destinations[w.dst].tensor, w.dst_strides, w.dst_offset),
            (1, sources[w.src], w.src_strides, w.src_offset),
        ):
            if kind and not isinstance(tensor, Tensor):
                continue
            if tensor.layout is not strided:
                continue
            width = tensor.element_size()
            form = form_of(sizes, strides, width)
            if form is None:
                continue
            space = -1
            begin = tensor.data_ptr()
            if not tensor.is_cpu:
                space = devices.setdefault(str(tensor.device), len(devices))
                if tensor.is_meta:
                    begin = _unreal_address(tensor, unreal)
            begin += offset * width
            if not kind and (form.folded or form.distinct < form.total):
                views.folded.append(len(views.tags))
            tag(2 * i + kind)
            begins(begin)
            ends(begin + form.span)
            form_at(form)
            space_at(space)
    return views


def _unreal_address(tensor: Tensor, known: dict[int, int]) -> int:
    """An address for a tensor without memory: views of one storage lie as they would if it had memory."""
    storage = tensor.untyped_storage()
    free = known.get(-1, 0)
    start = known.setdefault(storage._cdata, free)
    if start == free:
        known[-1] = free + max(storage.nbytes(), 1)
    return start + int(tensor.storage_offset()) * tensor.element_size()


def _examine(resolved: Resolved, views: _Views, cluster: Sequence[int]) -> list[Conflict]:
    ordered = sorted(cluster, key=views.tags.__getitem__)
    writes, written, reads, read = [], [], [], []
    for k in ordered:
        write, is_read = divmod(views.tags[k], 2)
        placed: Placed = views.begins[k], views.forms[k]
        if not is_read:
            writes.append(write)
            written.append(placed)
        elif not _in_place(resolved, views, k):
            # What one write copies onto itself no other write touches, or that is a conflict of the two writes.
            reads.append(write)
            read.append(placed)
    own, theirs = meetings(written, read)
    found = []
    for write, first, (_, form) in zip(writes, own, written):
        if first is not None:
            found.append(Conflict("write", writes[first], write))
        elif form.folded or overlaps_itself(form):
            found.append(Conflict("write", write, write))
    found += [Conflict("read", writes[k], r) for r, k in zip(reads, theirs) if k is not None]
    return found


def _in_place(resolved: Resolved, views: _Views, k: int) -> bool:
    """Whether the read at place k of the columns is of a write that copies a view onto itself."""
    if k == 0 or views.tags[k - 1] != views.tags[k] - 1:
        return False
    if (views.begins[k - 1], views.spaces[k - 1]) != (views.begins[k], views.spaces[k]):
        return False
    w = resolved.writes[views.tags[k] // 2]
    steps = zip(w.sizes, w.dst_strides, w.src_strides, strict=True)
    return resolved.destinations[w.dst].tensor.dtype == resolved.source_tensors[
        w.src
    ].dtype and all(d == s for n, d, s in steps if n > 1)
