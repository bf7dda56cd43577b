"""Who sends which elements to whom: the writes of whole tensors, cut by what every rank holds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..boxes import Box, boxes, clip, elements
from ..errors import Finding
from ..resolve import Resolved
from .agree import Common
from .layout import Held, shards_of

__all__ = ["Piece", "Routes", "Stream", "route"]


class Piece(NamedTuple):
    """A box of a write, of parts that two ranks hold; its first side is the destination's."""

    write: int
    box: Box


@dataclass
class Stream:
    """What one rank sends to others, in order. All receivers get the same.

    Attributes:
        sender: of the group.
        receivers: of the group, rising.
        pieces: boxes whose sides are in the indices of the sender's and the receivers' parts.
    """

    sender: int
    receivers: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Routes:
    """What one rank has to do with a set of writes.

    Attributes:
        here: pieces that this rank both holds and writes.
        streams: those that it sends or receives, by sender and receivers; all ranks have one order.
    """

    here: list[Piece]
    streams: list[Stream]


class _Cut(NamedTuple):
    """A box of parts, and the ranks that write it and that hold it."""

    writers: tuple[int, ...]
    holders: tuple[int, ...]
    box: Box


def route(resolved: Resolved, common: Common, rank: int) -> tuple[Routes, list[Finding]]:
    """Cut the writes, and choose for each box a rank that sends it.

    Args:
        resolved: writes of whole tensors, the same on every rank; destinations as in `common.dst`.
        common: who holds what.
        rank: this one.

    Returns:
        The rank's part of it, and what no rank holds.
    """
    names = {name: k for k, name in enumerate(common.src.description.names)}
    number = [names.get(name, -1) for name in resolved.source_names]
    first_made = len(number) - resolved.made
    known: dict[Hashable, tuple[list[_Cut], int]] = {}
    streams: dict[tuple[int, tuple[int, ...]], Stream] = {}
    here: list[Piece] = []
    findings: list[Finding] = []
    for i, w in enumerate(resolved.writes):
        if w.src >= first_made:
            continue  # what a rule makes, every rank makes for itself
        d, s = w.dst, number[w.src]
        dst, src = common.dst.held[d], common.src.held[s]
        geometry = w.geometry
        shapes = common.dst.description.shapes[d], common.src.description.shapes[s]
        key = (geometry, dst, src, shapes)
        found = known.get(key)
        if found is None:
            found = known[key] = _cuts(geometry, dst, shapes[0], src, shapes[1])
        cuts, missing = found
        if missing:
            findings.append(
                Finding(
                    resolved.destinations[w.dst].name,
                    "missing",
                    f"{missing} elements of {resolved.source_names[w.src]} that no rank holds",
                    "each on some rank",
                )
            )
        for writers, holders, box in cuts:
            if rank in writers and rank in holders:
                here.append(Piece(i, box))
            # Of several holders, another one for each write: all of them have a share of the work.
            sender = holders[i % len(holders)]
            if sender != rank and rank not in writers:
                continue
            receivers = tuple(r for r in writers if r not in holders)
            if receivers and (sender == rank or rank in receivers):
                stream = streams.get((sender, receivers))
                if stream is None:
                    stream = streams[sender, receivers] = Stream(sender, receivers)
                stream.pieces.append(Piece(i, box))
    return Routes(here, [streams[key] for key in sorted(streams)]), findings


def _cuts(
    geometry: tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...], int],
    dst: tuple[Held, ...],
    dst_shape: tuple[int, ...],
    src: tuple[Held, ...],
    src_shape: tuple[int, ...],
) -> tuple[list[_Cut], int]:
    """The boxes of a write, and how many elements of a part that is written nobody holds."""
    found: list[_Cut] = []
    missing = 0
    for whole in boxes(geometry, dst_shape, src_shape):
        # Copies of a tensor on several meshes have shards of their own each: every one is to be filled.
        for writer in shards_of(dst, dst_shape):
            # Each layout of the source has all of it: one that the writers have themselves costs no message.
            own = (h for h in src if set(writer.ranks) <= set(h.ranks))
            holders = shards_of((next(own, src[0]),), src_shape)
            for box in clip(whole, False, writer.axes):
                missing += elements(box)
                for holder in holders:
                    for piece in clip(box, True, holder.axes):
                        missing -= elements(piece)
                        found.append(_Cut(writer.ranks, holder.ranks, piece))
    return found, missing


def degree(streams: Sequence[Stream], rank: int) -> int:
    """How many messages a rank has on the way at once."""
    return sum(1 for s in streams if s.sender == rank or rank in s.receivers)
