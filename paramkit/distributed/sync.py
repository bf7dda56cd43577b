"""`Sync`: a trainer's weights into replicas, step after step."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import PlanError
from ..options import Options
from ..torn import Torn
from ..typing import Casting, Checksum, Hooks, Model, Overflow, Rules
from .buckets import Bucket
from .passing import Abandoned, pass_over
from .summary import explained
from .talk import Talk
from .work import Want, Work

__all__ = ["Sync", "SyncReport"]

_ARGUMENTS = "reading the arguments"
_CHECKSUMS = {
    None: (False, False),
    "bucket": (True, False),
    "parameter": (False, True),
    "both": (True, True),
}


@dataclass(frozen=True)
class SyncReport:
    """One step on this rank.

    Attributes:
        version: that every rank holds now.
        bytes_sent, bytes_received: of values; what goes to several ranks counts once for each.
        messages: sent and received.
        seconds: from the call to the agreement of all ranks.

    Example:
        >>> SyncReport(version=3, bytes_sent=1 << 20, bytes_received=0, messages=2, seconds=0.1).version
        3
    """

    version: int
    bytes_sent: int
    bytes_received: int
    messages: int
    seconds: float


class Sync:
    """Fills replicas from a trainer's weights, again and again; the plan is compiled once. Collective.

    Names, layouts, dtypes and shardings of trainer and replicas may differ. Weights go in buckets, in the
    narrower of the two dtypes; while one is on its way the next is packed, and the one before unpacked.

    A step is taken by all ranks together: at its end all replicas hold the next version, or it raises on
    every rank that can be reached, and `version` and `torn` say what this one holds. A rank that dies or
    hangs is noticed within the group's timeout. After that, `rebuild` with a new group and step again.

    Args:
        model: the replica of this rank: a module or mapping, with DTensors or plain tensors. None where
            there is none. With `stream=True`, a mapping of meta tensors: what `weights()` gives.
        group: the ranks that take part; None: all.
        source: the weights that this rank holds, as a module or mapping; None where it holds none.
        rules: as for `paramkit.plan`; the same on every rank, like all that follows.
        bucket_bytes: of a message. A rank keeps two for each rank that it sends to or receives from (one
            that goes to all alike counts once).
        checksum: "bucket": a sum of every message is checked before it is unpacked. "parameter": the
            values of every parameter are checked after it was written. "both". For looking into
            trouble: it reads everything twice, through torch.
        identity, allow_missing, allow_unexpected, casting, overflow, hooks: as for `paramkit.plan`.
        stream: this rank takes tensors from `weights()` or `buckets()`, for engines that load themselves.

    Attributes:
        version: of the weights that this rank holds: 0 before the first step.
        torn: what a failed step left of this rank's replica, None while it is whole.

    Raises:
        SyncError: on every rank, before anything is sent.

    Example:
        >>> import tempfile, torch, paramkit.distributed as pkd
        >>> store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> trainer, replica = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16()
        >>> sync = pkd.Sync(replica, source=trainer)
        >>> sync.step().version, torch.equal(replica.weight, trainer.weight.bfloat16())
        (1, True)
        >>> stream = pkd.Sync(source=trainer, stream=True)
        >>> [(name, tuple(tensor.shape)) for name, tensor in stream.weights()]
        [('weight', (2, 2)), ('bias', (2,))]
        >>> trainer.weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> sync.rebuild()
        >>> sync.step().version
        2
        >>> torch.distributed.destroy_process_group()
    """

    def __init__(
        self,
        model: Model | None = None,
        group: dist.ProcessGroup | None = None,
        *,
        source: Model | None = None,
        rules: Rules = (),
        bucket_bytes: int = 64 << 20,
        checksum: Checksum | None = None,
        identity: bool = True,
        allow_missing: Iterable[str] = (),
        allow_unexpected: Iterable[str] = (),
        casting: Casting = "same_kind",
        overflow: Overflow = "ignore",
        hooks: Hooks = "refuse",
        stream: bool = False,
    ) -> None:
        talk = Talk(group)
        made: list[Want] = []

        def read() -> None:
            if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int):
                raise TypeError(f"bucket_bytes must be a number of bytes, got {bucket_bytes!r}")
            if bucket_bytes < 4096:
                raise ValueError(f"bucket_bytes must be at least 4096, got {bucket_bytes}")
            if checksum not in _CHECKSUMS:
                raise ValueError(
                    f'checksum must be None, "bucket", "parameter" or "both", got {checksum!r}'
                )
            if stream and isinstance(model, nn.Module):
                raise TypeError(
                    "stream=True gives the tensors out: pass no model, or a mapping of meta tensors"
                )
            options = Options.make(
                rules,
                allow_missing,
                allow_unexpected,
                identity=identity,
                casting=casting,
                overflow=overflow,
                hooks=hooks,
            )
            made.append(Want(model, source, options, bucket_bytes, _CHECKSUMS[checksum], stream))

        talk.together(_ARGUMENTS, read)
        self._want = made[0]
        self.version = 0
        self.torn: Torn | None = None
        self._open: Any = None  # the generator of the step that is under way
        self._work = Work(talk, self._want, "planning")

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group in use."""
        return self._work.talk.group

    def step(self) -> SyncReport:
        """Send the weights as they are now. Collective.

        On a rank that takes a stream, call `weights()` or `buckets()` instead.

        Returns:
            The version, and what this rank sent and received.

        Raises:
            SyncError: on every rank that can be reached.
        """
        refusal = None
        if self._want.stream:
            refusal = PlanError("this rank takes a stream: use weights() or buckets() for a step.")
        start = perf_counter()
        for _ in self._passes(refusal):
            pass
        return self._report(start)

    def buckets(self) -> Iterator[Bucket]:
        """A step, on a rank that takes a stream: whole tensors, some at a time, in one buffer.

        Take them to the end: the other ranks wait. What is not taken to the end makes the step fail on
        every rank, once the generator is closed (`contextlib.closing`, where the taker may raise) or another step
        is begun.

        Yields:
            Buckets whose memory is used again for the next.

        Raises:
            SyncError: on every rank that can be reached.
        """
        refusal = None
        if not self._want.stream:
            refusal = PlanError("made without stream=True: call step().")
        passes = self._passes(refusal)
        try:
            for k in passes:
                assert self._work.buckets is not None
                yield self._work.buckets[k]
        finally:
            passes.close()  # now, so that whoever closes this one is told what it comes to

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """A step, on a rank that takes a stream: (name, tensor), as engines' `load_weights` take them.

        See `buckets`. A tensor is valid until the next one is asked for.

        Yields:
            Names and whole tensors, views of a bucket.

        Raises:
            SyncError: on every rank that can be reached.
        """
        passes = self.buckets()
        try:
            for bucket in passes:
                yield from bucket.tensors()
        finally:
            passes.close()  # type: ignore[attr-defined]

    def rebuild(self, group: dist.ProcessGroup | None = None) -> None:
        """Agree and compile anew: with a new group after a failure, or after parameters were replaced.

        Versions and torn states stay; the next step writes everything, and so repairs them. Collective
        over the new group; a rank that joins makes its `Sync` meanwhile.

        Args:
            group: None: the default group.

        Raises:
            SyncError: on every rank of the new group.
        """
        given_up = self._open
        if given_up is not None and not given_up.gi_running:
            with suppress(Abandoned):  # of the group before nobody waits any more
                given_up.throw(Abandoned("a new group took over"))
        talk = Talk(group)
        talk.together(_ARGUMENTS, lambda: None)  # as a rank does that makes its Sync now, and joins
        self._work = Work(talk, self._want, "planning")

    def explain(self) -> str:
        """What this rank sends and receives; never raises, and is not collective.

        Returns:
            Lines of text: tensors, bytes, with whom, and how much staging it takes.
        """
        return explained(self._work)

    def _passes(self, refusal: PlanError | None) -> Generator[int, None, None]:
        """Begin a step, and end one that was given up: the other ranks wait in that one."""
        given_up = self._open
        if given_up is not None:
            if not given_up.gi_running:
                given_up.close()  # raises, as on the other ranks
            raise PlanError("a step of this Sync is under way already.")
        self._open = step = self._step(refusal)
        return step

    def _step(self, refusal: PlanError | None) -> Generator[int, None, None]:
        work = self._work
        try:
            self.version = yield from pass_over(work, self.version, None, self._want.model, refusal)
            self.torn = None
        except BaseException:
            self.torn = work.torn or self.torn
            raise
        finally:
            self._open = None

    def _report(self, start: float) -> SyncReport:
        passes = self._work.passes
        return SyncReport(
            self.version,
            sum(t.bytes_sent for t in passes),
            sum(t.bytes_received for t in passes),
            sum(t.count for t in passes),
            perf_counter() - start,
        )

    def __repr__(self) -> str:
        state = "torn" if self.torn is not None else "whole"
        talk = self._work.talk
        return f"<paramkit.distributed.Sync: rank {talk.rank} of {talk.size}, version {self.version}, {state}>"
