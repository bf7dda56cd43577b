"""Sending: while one message is on its way, the next is packed and the one before is unpacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import Finding
from .checksum import checksum
from .errors import SyncError
from .talk import Talk
from .traffic import HEADER, Message, Round, Traffic

__all__ = ["Course", "Run", "Stopped"]

MAGIC = 0x706B5F73796E6331
Progress = Callable[[int, int], object]


@dataclass
class Course:
    """How far a run came on this rank.

    Attributes:
        error: the first thing that went wrong here; the run goes on to its end without writing.
        begun: whether something was written.
        direct: passes whose own part, without messages, was written in full.
        unpacked: rounds that were unpacked, of all passes; they come in order.
        wrong: numbers of writes whose values are not what was sent.
    """

    error: BaseException | None = None
    begun: bool = False
    direct: int = 0
    unpacked: int = 0
    wrong: list[int] = field(default_factory=list)

    def fail(self, error: BaseException) -> None:
        """Keep the first error."""
        if self.error is None:
            self.error = error


class Run:
    """One pass over all messages; `run()` is it.

    Args:
        talk: the group.
        traffic: the messages.
        version: in every header.
        direct: writes what this rank holds itself; None: it holds nothing.
        names, dtypes: of the destination of each write.
        sums: keep a sum of each message, of each piece.
        progress: called after every round with (bytes done, bytes in all).
        course: is told how far it came.
    """

    def __init__(
        self,
        talk: Talk,
        traffic: Traffic,
        version: int,
        direct: Callable[[], object] | None,
        names: Sequence[str],
        dtypes: Sequence[torch.dtype],
        sums: tuple[bool, bool],
        progress: Progress | None,
        course: Course,
    ) -> None:
        self.talk, self.traffic, self.version = talk, traffic, version
        self.direct, self.names, self.dtypes = direct, names, dtypes
        self.sums_bucket, self.sums_parameter = sums
        self.progress, self.course = progress, course
        self.broadcasts = broadcasts(traffic, talk.size)
        self.done = 0
        self.total = traffic.bytes_sent + traffic.bytes_received

    def run(self) -> None:
        """Send and receive everything.

        Raises:
            SyncError: a rank could not be reached. All other errors are kept in `course`.
        """
        rounds = self.traffic.rounds
        before: list[tuple[Any, int | None]] = []
        for k, found in enumerate(rounds):
            # The buffers of round k - 2 are free: it was settled, and unpacked, in the turn before.
            self._pack(found)
            posted = self._post(found)
            if k == 0:
                self._direct()
            else:
                self._settle(before)
                self._unpack(rounds[k - 1])
            before = posted
        if not rounds:
            self._direct()
        else:
            self._settle(before)
            self._unpack(rounds[-1])

    def _direct(self) -> None:
        """What this rank both holds and writes, while the first messages are on their way."""
        if self.direct is not None:
            self._guarded(self.direct)
        if self.course.error is None:
            self.course.direct += 1

    def _guarded(self, work: Callable[[], object], writes: bool = True) -> None:
        if self.course.error is not None:
            return
        self.course.begun |= writes
        try:
            work()
        except BaseException as error:
            self.course.fail(error)

    # -- sending --

    def _pack(self, found: Round) -> None:
        if not found.sends:
            return
        if self.course.error is None:
            try:
                if not found.pack.run(None):
                    raise SyncError("a source tensor was moved while it was sent.")
            except BaseException as error:
                self.course.fail(error)
        for _, buffer, message in found.sends:
            self._head(found.number, buffer, message)

    def _post(self, found: Round) -> list[tuple[Any, int | None]]:
        """Begin to send and receive a round, all of it at once: no rank waits for another's next round."""
        works: list[tuple[Any, int | None]] = []
        ops: list[dist.P2POp] = []
        peers: list[int] = []
        for sends, listed in ((True, found.sends), (False, found.receives)):
            for number, buffer, _ in listed:
                stream = self.traffic.streams[number]
                if number in self.broadcasts:
                    work = self._broadcast(buffer, stream.sender)
                    works.append((work, None if sends else stream.sender))
                    continue
                for peer in stream.receivers if sends else (stream.sender,):
                    ops.append(
                        self._op(dist.isend if sends else dist.irecv, buffer, peer, stream.sender)
                    )
                    peers.append(peer)
        if ops:
            with self.talk.reaching(f"one of the ranks {sorted(set(peers))}"):
                begun = dist.batch_isend_irecv(ops)
            each = peers if len(begun) == len(peers) else [None] * len(begun)
            works += zip(begun, each)
        return works

    def _op(self, kind: Any, buffer: Tensor, peer: int, sender: int) -> dist.P2POp:
        return dist.P2POp(
            kind, buffer, self.talk.ranks[peer], self.talk.group, tag=number_tag(sender)
        )

    def _head(self, round_: int, buffer: Tensor, message: Message) -> None:
        failed = self.course.error is not None
        at = self.traffic.payload_at(message)
        sum_ = 0
        if self.sums_parameter and not failed:
            try:
                self._put_sums(buffer, message)
            except BaseException as error:
                self.course.fail(error)
                failed = True
        if self.sums_bucket and not failed:
            sum_ = checksum(buffer[at:].view(torch.int64))
        head = [MAGIC, self.version, round_, int(failed), sum_, message.bytes, 0, 0]
        buffer[:HEADER].view(torch.int64).copy_(torch.tensor(head, dtype=torch.int64))

    def _put_sums(self, buffer: Tensor, message: Message) -> None:
        sums = [
            checksum(view, self.dtypes[write]) for write, view in self.traffic.views(message, True)
        ]
        held = buffer[HEADER : HEADER + 8 * len(sums)].view(torch.int64)
        held.copy_(torch.tensor(sums, dtype=torch.int64))

    def _broadcast(self, buffer: Tensor, sender: int) -> Any:
        with self.talk.reaching(f"rank {sender}"):
            return dist.broadcast(buffer, self.talk.ranks[sender], self.talk.group, async_op=True)

    # -- receiving --

    def _unpack(self, found: Round) -> None:
        for number, buffer, message in found.receives:
            self._look_at(self.traffic.streams[number].sender, found.number, buffer, message)
        if found.unpack is not None:
            self._guarded(lambda: self._write(found))
        if self.course.error is None:
            self.course.unpacked += 1
        if self.progress is not None:
            streams = self.traffic.streams
            self.done += sum(m.bytes * len(streams[n].receivers) for n, _, m in found.sends)
            self.done += sum(m.bytes for _, _, m in found.receives)
            self._guarded(lambda: self.progress and self.progress(self.done, self.total), False)

    def _look_at(self, sender: int, round_: int, buffer: Tensor, message: Message) -> None:
        head = buffer[:HEADER].view(torch.int64).tolist()
        if head[0] != MAGIC or head[2] != round_ or head[5] != message.bytes:
            self.course.fail(
                SyncError(f"a message from rank {sender} is not the one expected.", (), sender)
            )
        elif head[3]:
            # It tells of its error itself, at the end.
            self.course.fail(Stopped(f"rank {sender} failed while it sent.", (), sender))
        elif head[1] != self.version:
            self.course.fail(
                SyncError(
                    f"rank {sender} sent version {head[1]}, expected {self.version}.", (), sender
                )
            )
        elif self.sums_bucket:
            got = checksum(buffer[self.traffic.payload_at(message) :].view(torch.int64))
            if got != head[4]:
                self.course.fail(
                    SyncError(
                        f"a message from rank {sender} was damaged on its way: its sum is {got & MASK:016x}, "
                        f"that of what was sent {head[4] & MASK:016x}.",
                        (),
                        sender,
                    )
                )

    def _write(self, found: Round) -> None:
        if not found.unpack.run(None):
            raise SyncError("a parameter was moved while it was written.")
        if not self.sums_parameter:
            return
        for _, buffer, message in found.receives:
            held = buffer[HEADER : HEADER + 8 * len(message.parts)].view(torch.int64).tolist()
            for wanted, (write, view) in zip(held, self.traffic.views(message, False)):
                if checksum(view) != wanted:
                    self.course.wrong.append(write)
        if self.course.wrong:
            names = list(dict.fromkeys(self.names[w] for w in self.course.wrong))
            raise SyncError(
                "values are not what was sent.",
                [
                    Finding(n, "conflict", "another sum of its values", "that of the sender's")
                    for n in names
                ],
                self.talk.rank,
            )

    def _settle(self, works: Sequence[tuple[Any, int | None]]) -> None:
        for work, peer in works:
            with self.talk.reaching("a rank of the group" if peer is None else f"rank {peer}"):
                work.wait()


MASK = (1 << 64) - 1


class Stopped(SyncError):
    """A rank stopped because another one had failed."""


def number_tag(sender: int) -> int:
    """A tag apart from those of others who use the group; messages of one sender keep their order."""
    return 0x706B + sender % 1024


def broadcasts(traffic: Traffic, size: int) -> frozenset[int]:
    """Streams that go by broadcast: the only one that a rank sends to all others.

    Broadcasts have to be in one order on all ranks; with several senders, all take the way of pairs.
    """
    if size < 3:
        return frozenset()
    to_all = [n for n, s in enumerate(traffic.streams) if len(s.receivers) == size - 1]
    return frozenset(to_all) if len(to_all) == 1 else frozenset()
