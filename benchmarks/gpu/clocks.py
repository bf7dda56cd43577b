"""The two ways in which a side is timed.

* **wall**: the host's clock, from the call until the stream is empty; one call a sample, after
  something else has filled the cache. What somebody waits for who makes a single call.
* **events**: two CUDA events around calls in a row, at least four of them, or as many as take about
  2 ms. What a call costs who makes many: the device's time or the host's, whichever is longer. Nothing
  is queued before, so the host gets no head start; where it is the device's cache that would make a
  call fast, several sets of tensors take turns (`Work.turns`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .device import Device

__all__ = ["SAMPLE", "Side"]

SAMPLE = 2e6
"""Nanoseconds that the calls between two events should take."""

LEAST, MOST = 4, 256
"""Calls between two events."""

SLOW = 100e6
"""Nanoseconds from which fewer than `LEAST` calls are enough."""


@dataclass
class Side:
    """A call to be timed by one of the clocks; the same face as `benchmarks.sides.Side`."""

    name: str
    call: Callable[[], object]
    gpu: Device
    clock: str
    bytes: int
    turns: int = 1
    inner: int = field(default=1, init=False)

    def prepare(self) -> None:
        """Warm up, and choose how many calls make a sample: whole turns of all sets."""
        for _ in range(self.turns):
            self.call()
        self.gpu.synchronize()
        if self.clock == "events":
            once = min(self._events(self.turns) for _ in range(2))
            once = max(once, 1.0)
            wanted = min(MOST, max(SAMPLE / once, min(LEAST, SLOW / once)))
            self.inner = max(1, math.ceil(wanted / self.turns)) * self.turns

    def sample(self, inner: int | None = None) -> float:
        """Nanoseconds of one call."""
        if self.clock == "wall":
            return self._wall()
        return self._events(inner or self.inner)

    def _wall(self) -> float:
        self.gpu.flush()
        self.gpu.synchronize()
        start = self.gpu.now()
        self.call()
        self.gpu.synchronize()
        return float(self.gpu.now() - start)

    def _events(self, count: int) -> float:
        self.gpu.flush()
        self.gpu.synchronize()
        call = self.call
        first = self.gpu.mark()
        for _ in range(count):
            call()
        second = self.gpu.mark()
        self.gpu.synchronize()
        return self.gpu.between(first, second) / count
