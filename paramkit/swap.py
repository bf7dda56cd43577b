"""Putting a source into a model for a while: exchanged in place, or with a copy of what was there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .conflicts import find_conflicts
from .destinations import Destination
from .execution import write
from .journal import Journal
from .pieces import same_memory
from .resolve import Resolved
from .stream import Streamed

__all__ = ["Exchange"]


class Exchange:
    """One source swapped in.

    Args:
        compiled: the plan.
        resolved: its writes, with the sources in use.
        own: whether the sources are the user's own memory, which may be written.

    Attributes:
        in_place: exchanged, without a copy.
    """

    def __init__(self, compiled: Any, resolved: Resolved, own: bool) -> None:
        self._compiled = compiled
        self.in_place = own and not isinstance(compiled, Streamed) and _one_to_one(resolved)
        self._journal = Journal()
        self._before = compiled.exchanges() if self.in_place else 0

    def enter(self) -> bool:
        """Put the source in. False, and nothing written, where a tensor is not what was planned for."""
        with self.claim():
            if self.in_place:
                return bool(self._compiled.exchange())
            return write(self._compiled, self._journal)

    def leave(self) -> list[int]:
        """Put back what was there; nothing where nothing was put in. May be called again where it was interrupted.

        Returns:
            Numbers of the writes whose memory is gone, so that nothing could be put back.
        """
        with self.claim():
            if not self.in_place:
                self._journal.restore()
            # Counted where it happens: an interrupt may come between an exchange and its return.
            elif (self._compiled.exchanges() - self._before) % 2:
                return list(self._compiled.exchange_back())
        return []

    def claim(self) -> Any:
        """Keeps other threads from both sides while a block runs."""
        return self._compiled.claim("exchange" if self.in_place else "write")


def _is_writable(source: Any) -> bool:
    """Whether a source is a plain tensor in memory of torch's own: anything else may be read-only."""
    return (
        isinstance(source, Tensor)
        and source.layout is torch.strided
        and source.untyped_storage().resizable()
        and (not source.is_inference() or torch.is_inference_mode_enabled())
    )


def _one_to_one(resolved: Resolved) -> bool:
    """Whether every source element goes to one destination element of its dtype, and none is shared."""
    sources: list[Any] = resolved.source_tensors
    if resolved.made or not all(map(_is_writable, sources)):
        return False
    if not all(same_memory(sources, a, b) for a, b in resolved.ties):
        return False
    if any(
        sources[w.src].dtype != resolved.destinations[w.dst].tensor.dtype for w in resolved.writes
    ):
        return False
    # The other way round, the sources are what is written: once each, as is proved of destinations.
    back = Resolved(
        [
            Destination(name, t, None, name, "tensor")
            for name, t in zip(resolved.source_names, sources)
        ],
        [d.name for d in resolved.destinations],
        [d.tensor for d in resolved.destinations],
        [
            replace(
                w,
                dst=w.src,
                src=w.dst,
                dst_strides=w.src_strides,
                dst_offset=w.src_offset,
                src_strides=w.dst_strides,
                src_offset=w.dst_offset,
            )
            for w in resolved.writes
        ],
    )
    return not find_conflicts(back)
