"""Memory that writes in other threads may not touch meanwhile: the fallback's part of csrc/torch/claims.h.

torch's own `copy_` gives the GIL up, so every write of a plan says what memory it is at, and waits for those before
it that would make a mix.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from operator import attrgetter
from time import sleep
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import PlanError

__all__ = ["Claim", "Ranges", "ranges_of", "set_claims"]


class Ranges(list[tuple[int, int]]):
    """Addresses of memory: [begin, end), sorted and merged."""


_DOING = {"write": (True, False), "compare": (False, False), "exchange": (True, True)}
_LONGEST_PAUSE = 0.01  # seconds, between two looks of a thread that waits

# NOTE: [Interrupts] An interrupt may come at the beginning of every function of Python, so also of an `__exit__`, and
# of those of threading.Condition; not between a block's end and what a plain lock does there. So a claim is held as
# long as a lock of its own is, and the block ends with that lock's `__exit__`.
# Reentrant: the garbage collector may end a block of `swapped` that nobody holds any more in the middle of `_take`.
_lock = threading.RLock()
_claims: list[Claim] = []  # in the order in which they came, and some that are over
_wanted = True


class Claim:
    """Held while a block runs. Of blocks that would make a mix, the later one waits.

    Blocks of one thread inside each other never wait for each other. It holds no tensor.

    Args:
        dsts, srcs: the tensors of both sides, or their `ranges_of`.
        doing: "write" (from `srcs` to `dsts`), "compare" or "exchange".

    Raises:
        PlanError: on entering, where this thread is in another block and would have to wait.
    """

    def __init__(
        self, dsts: Ranges | Iterable[Tensor], srcs: Ranges | Iterable[Tensor], doing: str = "write"
    ) -> None:
        self._sides = tuple(s if isinstance(s, Ranges) else ranges_of(s) for s in (dsts, srcs))
        if doing not in _DOING:
            raise ValueError(f"claim: got {doing!r}, expected 'write', 'compare' or 'exchange'")
        self._written = _DOING[doing]
        self._thread = 0  # that entered it
        self._active = False  # no longer waiting
        self._held = threading.Lock()

    def __enter__(self) -> Claim:
        self._held.acquire()
        try:
            if _wanted:
                self._take()
        except BaseException:  # an interrupt, too
            self._held.release()
            raise
        return self

    if TYPE_CHECKING:

        def __exit__(self, *exc: object) -> None: ...
    else:
        __exit__ = property(attrgetter("_held.__exit__"))

    def _take(self) -> None:
        self._thread = threading.get_ident()
        # By the garbage collector, in the middle of this.
        inside = _lock._is_owned()  # type: ignore[attr-defined]
        with _lock:
            _claims.append(self)
            live = _live()
            # Nobody else can go on while this thread has the lock, so it does not wait with it.
            holding = inside or any(c._thread == self._thread for c in live if c is not self)
            self._active = not self._blocked(live, holding)
        if not self._active and holding:
            raise PlanError(
                "another thread is at the same tensors, and cannot be waited for inside a write of this "
                "thread; nothing was written."
            )
        pause = 0.0
        while not self._active:
            pause = min(pause + 0.0005, _LONGEST_PAUSE)
            sleep(pause)
            with _lock:
                self._active = not self._blocked(_live(), False)

    def _blocked(self, live: list[Claim], holding: bool) -> bool:
        """Whether a claim of another thread is at the same memory, and one of the two writes it.

        One that came before, or that is at work. A thread that holds a claim looks at those at work alone: what waits
        may wait for it. So it may pass by what waits, which has to see it there, behind itself.
        """
        before = not holding
        for other in live:
            if other is self:
                before = False
            if other._thread == self._thread or not (before or other._active):
                continue
            for own, written in zip(self._sides, self._written):
                for theirs, written_there in zip(other._sides, other._written):
                    if (written or written_there) and _meet(own, theirs):
                        return True
        return False


def _live() -> list[Claim]:
    """Those that are not over, in order; the others are forgotten. With the lock."""
    live = []
    for claim in tuple(_claims):
        if claim._held.locked():
            live.append(claim)
        else:
            with suppress(ValueError):  # the collector has been here
                _claims.remove(claim)
    return live


def set_claims(wanted: bool) -> bool:
    """For tests that show what happens without: whether writes wait. Returns what it was."""
    global _wanted
    before, _wanted = _wanted, wanted
    return before


def ranges_of(tensors: Iterable[Tensor]) -> Ranges:
    """The memory that tensors lie in, where they have some of torch's own."""
    found = []
    for t in tensors:
        try:
            if t.layout is not torch.strided or not t.numel() or not t.untyped_storage().data_ptr():
                continue
            begin, strides = t.data_ptr(), t.stride()
        # A wrapper of another tensor; a parameter that has no shape yet.
        except (RuntimeError, NotImplementedError, ValueError):
            continue
        reach = sum((n - 1) * step for n, step in zip(t.shape, strides)) + 1
        found.append((begin, begin + reach * t.element_size()))
    merged = Ranges()
    for begin, end in sorted(found):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _meet(a: Ranges, b: Ranges) -> bool:
    short, long = sorted((a, b), key=len)
    begins = [begin for begin, _ in long]
    for begin, end in short:
        # The last of the others that begins before this one ends: all before it end before it begins.
        k = bisect_right(begins, end - 1) - 1
        if k >= 0 and long[k][1] > begin:
            return True
    return False


def _forget() -> None:
    """In a child the other threads are not there, nor what they were at."""
    global _lock
    _lock = threading.RLock()
    here = threading.get_ident()
    _claims[:] = [c for c in _claims if c._thread == here]


os.register_at_fork(after_in_child=_forget)
