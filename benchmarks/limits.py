"""The limit of a machine: the bandwidth of the best plain C copy, fill and comparison of 256 MiB.

The best loop is chosen once by a short trial of all of them. Cases that are held to the limit then
time it in their own rounds; for all others the median over the run is the limit.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks import plain

__all__ = ["KINDS", "SIZE", "Limits"]

SIZE = 256 * 1024 * 1024

KINDS = ("copy", "fill", "compare")
"""A comparison reads two streams and writes nothing; it is measured where a case needs it."""


class Limits:
    """The chosen loops, and every sample taken of them in this run.

    Args:
        size: bytes written by one copy or fill, or of each side of a comparison; tests use less than
            256 MiB.
    """

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._loops: dict[str, plain.Loop | plain.Compare] = {}
        self._samples: dict[str, list[float]] = {what: [] for what in KINDS}

    def loop(self, what: str) -> plain.Loop | plain.Compare | None:
        """The best plain loop for one of `KINDS`; None without a C compiler."""
        if not plain.available():
            return None
        if what not in self._loops:
            dst = torch.ones(self._size, dtype=torch.uint8)
            src = None if what == "fill" else torch.ones(self._size, dtype=torch.uint8)
            if what == "compare":
                assert src is not None
                self._loops[what] = plain.best(plain.comparisons(dst, src))
            else:
                self._loops[what] = plain.best(plain.candidates(dst, src))
        return self._loops[what]

    def add(self, what: str, nanoseconds: list[float]) -> None:
        """Samples of a case's own rounds."""
        loop = self.loop(what)
        assert loop is not None
        self._samples[what] += [loop.bytes / time for time in nanoseconds]

    def measured(self) -> set[str]:
        """Which of `KINDS` have samples."""
        return {what for what, samples in self._samples.items() if samples}

    def measure(self, what: str, rounds: int = 5) -> None:
        """Sample a loop alone, for runs in which no case does."""
        loop = self.loop(what)
        assert loop is not None
        times = []
        for _ in range(rounds):
            start = time.perf_counter_ns()
            loop()
            times.append(float(time.perf_counter_ns() - start))
        self.add(what, times)

    def gbs(self, what: str) -> float | None:
        """The median of all samples, in GB/s."""
        samples = self._samples[what]
        return statistics.median(samples) if samples else None

    def as_dict(self) -> dict[str, object]:
        """Plain data for the result."""
        facts: dict[str, object] = {"bytes": self._size}
        for what in KINDS:
            loop, samples = self._loops.get(what), self._samples[what]
            if loop is None or not samples:
                facts[what] = None
                continue
            low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
            facts[what] = {
                "loop": loop.name,
                "threads": loop.threads,
                "gbs": round(middle, 3),
                "gbs_q1": round(low, 3),
                "gbs_q3": round(high, 3),
                "samples": len(samples),
            }
        if plain.why_not():
            facts["why_not"] = plain.why_not()
        return facts
