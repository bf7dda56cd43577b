"""Messages: which pieces each holds, and the fused writes that pack and unpack them.

A message is a header, sums if they are asked for, and pieces one behind the other in the narrower of the
two dtypes. The header says whether its sender still is well: a receiver unpacks nothing of one that is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..boxes import elements, halved, placed
from ..pieces import view_of
from ..sources.lazy import contiguous_strides
from .routes import Piece, Stream

__all__ = ["ALIGN", "HEADER", "Locals", "Message", "Part", "Round", "Traffic", "messages"]

ALIGN = 16  # bytes: every element of every dtype is at home at a multiple of it
HEADER = 64


class Part(NamedTuple):
    """A piece in a message."""

    piece: Piece
    dtype: torch.dtype
    at: int  # bytes from the begin of the payload


class Message(NamedTuple):
    """What is sent at once."""

    parts: tuple[Part, ...]
    bytes: int  # of the payload


class Locals(NamedTuple):
    """The tensors of this rank, for each write; None where it does not write, or does not read.

    Attributes:
        dst, src: number of a write -> local tensor.
    """

    dst: Sequence[Any]
    src: Sequence[Any]


@dataclass
class Round:
    """One message of each stream at most, and the plans that pack and unpack all of them.

    Attributes:
        number: rounds are alike on all ranks: message `number` of every stream.
        sends, receives: (stream's number, buffer of this size with the header, message).
    """

    number: int
    sends: list[tuple[int, Tensor, Message]] = field(default_factory=list)
    receives: list[tuple[int, Tensor, Message]] = field(default_factory=list)
    pack: Any = None
    unpack: Any = None


def wire_dtype(src: torch.dtype, dst: torch.dtype) -> torch.dtype:
    """What travels: the narrower of the two, so that a conversion is done once, as torch does it."""
    return dst if dst.itemsize <= src.itemsize else src


def messages(stream: Stream, dtypes: Sequence[torch.dtype], capacity: int) -> Iterator[Message]:
    """The pieces of a stream as messages.

    Args:
        stream: its pieces, in order.
        dtypes: what travels, for each write.
        capacity: bytes of a payload, a multiple of `ALIGN`.
    """
    parts: list[Part] = []
    at = 0
    for write, box in stream.pieces:
        dtype = dtypes[write]
        width = dtype.itemsize
        whole = elements(box) * width
        for piece in (box,) if whole <= capacity else halved(box, capacity // width):
            size = whole if piece is box else elements(piece) * width
            if parts and at + size > capacity:
                yield Message(tuple(parts), at)
                parts, at = [], 0
            parts.append(Part(Piece(write, piece), dtype, at))
            at += -(-size // ALIGN) * ALIGN
    if parts:
        yield Message(tuple(parts), at)


class Traffic:
    """All messages of one rank, and the memory that they go through: two buffers for each stream.

    Args:
        streams: those of this rank.
        rank: of the group.
        own: the tensors of this rank.
        dtypes: what travels, for each write.
        capacity: bytes of a payload.
        sums: keep 8 bytes for each piece.
        device: of the buffers.

    Attributes:
        rounds: in order.
        staging: bytes of all buffers.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        rank: int,
        own: Locals,
        dtypes: Sequence[torch.dtype],
        capacity: int,
        sums: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.streams, self.rank, self.own, self.sums = list(streams), rank, own, sums
        self.device = torch.device("cpu") if device is None else device
        self._buffers: list[list[Tensor]] = []
        self.rounds: list[Round] = []
        for number, stream in enumerate(self.streams):
            cut = list(messages(stream, dtypes, capacity))
            size = max((self.size_of(m) for m in cut), default=0)
            halves = [
                torch.empty(size, dtype=torch.uint8, device=self.device)
                for _ in range(min(2, len(cut)))
            ]
            self._buffers.append(halves)
            for k, message in enumerate(cut):
                while len(self.rounds) <= k:
                    self.rounds.append(Round(len(self.rounds)))
                buffer = halves[k % 2][: self.size_of(message)]
                sent = stream.sender == rank
                (self.rounds[k].sends if sent else self.rounds[k].receives).append(
                    (number, buffer, message)
                )
        self.staging = sum(len(b) for halves in self._buffers for b in halves)
        active = backend.active()
        for found in self.rounds:
            found.pack = self._plan(active, found.sends, True)
            found.unpack = self._plan(active, found.receives, False)

    def size_of(self, message: Message) -> int:
        """Bytes of a message with its header and sums."""
        return self.payload_at(message) + message.bytes

    def payload_at(self, message: Message) -> int:
        """Where the payload begins."""
        sums = 8 * len(message.parts) if self.sums else 0
        return HEADER + -(-sums // ALIGN) * ALIGN

    def _plan(self, active: Any, found: Sequence[tuple[int, Tensor, Message]], packs: bool) -> Any:
        if not found:
            return None
        staged: list[Tensor] = []
        stage_of: dict[tuple[int, torch.dtype], int] = {}
        local: list[Tensor] = []
        local_of: dict[int, int] = {}
        writes = []
        # Boxes are shared by tensors of equal shapes and layouts.
        known: dict[tuple[int, tuple[int, ...]], tuple[Any, ...]] = {}
        for number, (_, buffer, message) in enumerate(found):
            payload = buffer[self.payload_at(message) :]
            for (write, box), dtype, at in message.parts:
                stage = stage_of.get((number, dtype))
                if stage is None:
                    stage = stage_of[number, dtype] = len(staged)
                    whole = len(payload) // dtype.itemsize * dtype.itemsize
                    staged.append(payload[:whole].view(dtype))
                tensor = (self.own.src if packs else self.own.dst)[write]
                mine = local_of.get(id(tensor))
                if mine is None:
                    mine = local_of[id(tensor)] = len(local)
                    local.append(tensor)
                key = (id(box), tensor.stride())
                found_ = known.get(key)
                if found_ is None:
                    side = box.second if packs else box.first
                    row = contiguous_strides(box.sizes)
                    found_ = known[key] = (box.sizes, row, *placed(side, key[1]))
                sizes, row, steps, offset = found_
                if packs:
                    writes.append((stage, mine, sizes, row, at // dtype.itemsize, steps, offset))
                else:
                    writes.append((mine, stage, sizes, steps, offset, row, at // dtype.itemsize))
        pair = (staged, local) if packs else (local, staged)
        return active.Plan(*pair, writes, [], False, False)

    def views(self, message: Message, sent: bool) -> Iterator[tuple[int, Tensor]]:
        """The elements of this rank that a message's pieces are of, with the number of their write."""
        for (write, box), _, _ in message.parts:
            tensor = (self.own.src if sent else self.own.dst)[write]
            side = box.second if sent else box.first
            yield write, view_of(tensor, box.sizes, *placed(side, tensor.stride()))

    @cached_property
    def bytes_sent(self) -> int:
        """Payload bytes, counted once for each receiver."""
        return sum(
            m.bytes * len(self.streams[n].receivers) for r in self.rounds for n, _, m in r.sends
        )

    @cached_property
    def bytes_received(self) -> int:
        """Payload bytes."""
        return sum(m.bytes for r in self.rounds for _, _, m in r.receives)

    @cached_property
    def count(self) -> int:
        """Messages sent and received, a broadcast counted as one."""
        return sum(len(r.sends) + len(r.receives) for r in self.rounds)
