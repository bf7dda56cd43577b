"""Timing several ways of doing the same thing, fairly: interleaved, medians, with their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

__all__ = ["Timing", "interleaved"]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs: the median and the quartiles."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """From single times.

        Example:
            >>> Timing.of([1.0, 2.0, 3.0]).median
            2.0
        """
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        return cls(median(seconds), low, high, len(seconds))


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    after_round: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time each way `repeats` times, all of them in turn, so that a slow moment hits all alike.

    Args:
        ways: what to time. Each runs once before, untimed.
        repeats: rounds; each begins with another way.
        after_round: called after each round, for showing progress.

    Returns:
        The times of each way.
    """
    names = list(ways)
    for name in names:
        ways[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(repeats):
        turn = k % len(names)
        for name in names[turn:] + names[:turn]:
            start = perf_counter()
            ways[name]()
            seconds[name].append(perf_counter() - start)
        if after_round is not None:
            after_round()
    return {name: Timing.of(found) for name, found in seconds.items()}
