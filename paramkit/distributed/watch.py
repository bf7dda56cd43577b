"""What has to be as it was when a transfer was compiled, for it to run again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..destinations import Destination
from ..errors import Finding
from ..judge import slots_of
from ..regions import Region, cover
from ..sharding import is_sharded
from ..sources.lazy import reach

__all__ = ["Watch", "meeting_findings"]

_local = attrgetter("_local_tensor")


class Watch:
    """Notices parameters that were replaced, and DTensors with other local tensors.

    Args:
        written: destinations of this rank, and the dict that they are the values of, if it is one.
        read: the same of sources.
    """

    def __init__(
        self,
        written: tuple[Sequence[Destination], Any],
        read: tuple[Sequence[Destination], Any],
    ) -> None:
        slots: list[Any] = []
        self._names: list[str] = []
        self._shards: list[tuple[str, Any]] = []
        self._bumped: list[Any] = []
        for found, given in (written, read):
            more, names = slots_of(found, given if isinstance(given, dict) else None)
            slots += more
            self._names += names
            self._shards += [(d.name, d.tensor) for d in found if is_sharded(d.tensor)]
        self._bumped = [d.tensor for d in written[0] if is_sharded(d.tensor)]
        self._wrappers = [wrapper for _, wrapper in self._shards]
        self._locals = list(map(_local, self._wrappers))
        self._slots = backend.active().Plan([], [], [], slots, False, False)

    def findings(self) -> list[Finding]:
        """What is no longer there."""
        found = [
            Finding(
                self._names[k],
                "replaced",
                "another object in the model",
                "the one planned for",
                "rebuild(), or plan again",
            )
            for k in self._slots.replaced()
        ]
        # Without a Python frame for each: this runs before every step, over every shard.
        if not all(map(is_, map(_local, self._wrappers), self._locals)):
            found += [
                Finding(name, "moved", "another local tensor", "the one planned for", "rebuild()")
                for (name, wrapper), local in zip(self._shards, self._locals)
                if wrapper._local_tensor is not local
            ]
        return found

    def bump(self) -> None:
        """What autograd saved is the DTensor: its version counts, beside that of its local tensor."""
        if self._bumped:
            torch.autograd.graph.increment_version(self._bumped)


def meeting_findings(
    written: Iterable[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]]
) -> list[Finding]:
    """Tensors of this rank that share memory, where one of them is written.

    That the writes of one tensor do not meet is proved elsewhere. Views whose elements interleave, such as
    columns of one matrix, are apart.
    """
    spans = [(*_span(tensor), True, name, tensor) for name, tensor in written]
    spans += [(*_span(tensor), False, name, tensor) for name, tensor in read]
    found = []
    # Those that reach beyond the begin of the one that is looked at, by whether they are written.
    open_: dict[bool, list[tuple[int, str, Tensor]]] = {True: [], False: []}
    for begin, end, is_written, name, tensor in sorted(
        (s for s in spans if s[0] < s[1]), key=lambda s: s[:4]
    ):
        for other in (True, False) if is_written else (True,):
            open_[other] = [o for o in open_[other] if o[0] > begin]
            pairs = ((n, (tensor, t) if is_written else (t, tensor)) for _, n, t in open_[other])
            its = next((n for n, (dst, src) in pairs if _meet(dst, src)), None)
            if its is None:
                continue
            destination, its = (name, its) if is_written else (its, name)
            what = "is written too" if other and is_written else "of the source is read"
            found.append(
                Finding(
                    destination,
                    "conflict",
                    f"memory of which {its} {what}",
                    "tensors apart from each other",
                    "clone() one of them",
                )
            )
        open_[is_written].append((end, name, tensor))
    return found


def _meet(written: Tensor, other: Tensor) -> bool:
    """Whether two tensors have a byte in common."""
    pair = (written, other)
    origin = min(t.data_ptr() for t in pair)
    regions = []
    for t in pair:
        width = t.element_size()
        strides = (*(n * width for n in t.stride()), 1)
        regions.append(Region(t.data_ptr() - origin, (*t.shape, width), strides))
    # Not (1, 1): what is read may have one element at several indices.
    return cover(regions[0], regions).twice == (0, 1)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first to behind the last element."""
    if not tensor.numel() or tensor.is_meta:
        return 0, 0
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * tensor.element_size()
    return begin, begin + reach(tensor.shape, tensor.stride()) * tensor.element_size()
