"""Threads for tests: started together, their errors told, and a write that stops half way until it is told to go on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from paramkit.backend import loader, native

__all__ = ["LIMIT", "Paused", "Work", "claims", "hasty", "together", "until_it_waits"]

LIMIT = 60.0
"""Seconds after which something hangs."""


class Work(threading.Thread):
    """A call in a thread of its own; `result()` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._value: object = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> object:
        self.join(LIMIT)
        assert not self.is_alive(), "the thread hangs"
        if self._error is not None:
            raise self._error
        return self._value

    def finishes(self, seconds: float) -> bool:
        """Whether it ends within a time, with or without an error."""
        self.join(seconds)
        return not self.is_alive()


def together(calls: Sequence[Callable[[], object]]) -> list[object]:
    """All calls at once, each in a thread; what they return. Raises what the first of them raised."""
    barrier = threading.Barrier(len(calls))

    def start(call: Callable[[], object]) -> object:
        barrier.wait(LIMIT)
        return call()

    started = [Work(lambda call=call: start(call)) for call in calls]  # type: ignore[misc]
    return [work.result() for work in started]


class Paused:
    """A write in a thread, stopped in its first `progress` call until `go_on()`.

    Args:
        write: called with a progress function.
    """

    def __init__(self, write: Callable[[Callable[[int, int], None]], object]) -> None:
        self._there, self._on = threading.Event(), threading.Event()
        self._work = Work(lambda: write(self._progress))
        assert self._there.wait(LIMIT), "it was over, or did not begin"

    def _progress(self, written: int, total: int) -> None:
        if not self._there.is_set():
            assert 0 < written < total or total == 0, "not in the middle"
            self._there.set()
            assert self._on.wait(LIMIT)

    def go_on(self) -> object:
        """Let it end; what it returned."""
        self._on.set()
        return self._work.result()


def until_it_waits(call: Callable[[], object]) -> Work:
    """Begin a call in a thread; returns when it waits for something without the GIL, or is over.

    No thread takes the GIL from another meanwhile, so what the call does before that is done in one go.
    """
    begun = threading.Event()

    def begin() -> object:
        begun.set()
        return call()

    before = sys.getswitchinterval()
    sys.setswitchinterval(LIMIT)
    try:
        work = Work(begin)
        assert begun.wait(LIMIT)
    finally:
        sys.setswitchinterval(before)
    return work


@contextmanager
def hasty() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def claims(wanted: bool) -> Iterator[None]:
    """With False: writes of several threads do not wait for each other."""
    both = [m for m in (loader.extension(), native) if m is not None]
    before = [m.set_claims(wanted) for m in both]
    try:
        yield
    finally:
        for module, was in zip(both, before, strict=True):
            module.set_claims(was)
