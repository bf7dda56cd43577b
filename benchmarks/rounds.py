"""The order of things: which side is timed when, and how often."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.sides import Side

__all__ = ["FULL", "QUICK", "TINY", "Budget", "balanced", "hot", "interleaved"]


@dataclass(frozen=True)
class Budget:
    """Limits on one case: seconds of measuring, and the least and most rounds."""

    seconds: float
    least: int
    most: int


FULL = Budget(seconds=3.0, least=9, most=600)
QUICK = Budget(seconds=0.25, least=4, most=100)
TINY = Budget(seconds=0.0, least=4, most=4)


def balanced(count: int) -> list[list[int]]:
    """Orders of `count` sides, in which each side follows each other one equally often.

    Whoever runs first finds the caches as another left them. A plain rotation would give every side
    the same forerunner in all rounds; in these orders (Williams' squares) that advantage is shared.

    >>> balanced(2)
    [[0, 1], [1, 0]]
    >>> balanced(4)
    [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]
    """
    first, low, high = [0], 1, count - 1
    while low <= high:
        first.append(low)
        if low != high:
            first.append(high)
        low, high = low + 1, high - 1
    rows = [[(each + shift) % count for each in first] for shift in range(count)]
    if count % 2:
        rows += [list(reversed(row)) for row in rows]
    return rows


def interleaved(sides: Mapping[str, Side], budget: Budget) -> dict[str, list[float]]:
    """Every round runs each side once; the rounds end with a whole cycle of orders."""
    ready = list(sides.values())
    slow = max(side.sample(1) for side in ready) > 5e6
    for _ in range(0 if slow else 2):
        for side in ready:
            side.sample(1)
    orders = balanced(len(ready))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    stop = time.perf_counter() + budget.seconds
    for turn in range(budget.most):
        late = turn >= budget.least and time.perf_counter() > stop
        if late and turn % min(len(orders), budget.least) == 0:
            break
        for index in orders[turn % len(orders)]:
            side = ready[index]
            samples[side.name].append(side.sample())
    return samples


def hot(sides: Mapping[str, Side], budget: Budget) -> dict[str, list[float]]:
    """Each side alone in a loop, first one, then the other."""
    return {name: _alone(side, budget) for name, side in sides.items()}


def _alone(side: Side, budget: Budget) -> list[float]:
    # Enough calls a sample for the clock's own cost (about 50 ns) to vanish.
    once = min(side.sample(1) for _ in range(5))
    inner = max(1, int(200_000 // max(once, 1.0)))
    samples: list[float] = []
    stop = time.perf_counter() + budget.seconds / 2
    for turn in range(budget.most):
        if turn >= budget.least and time.perf_counter() > stop:
            break
        samples.append(side.sample(inner))
    return samples
