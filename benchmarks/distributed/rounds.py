"""One case on one rank of several: checked bit for bit, then timed in turns with all the others."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.rounds import balanced

from .registry import Case, Setting, Work

__all__ = ["Measured", "measure"]

# Seconds of the rounds (None: the case's own), and the least and most of them.
BUDGETS: dict[str, tuple[float | None, int, int]] = {
    "full": (None, 4, 40),
    "quick": (3.0, 4, 12),
    "tiny": (0.0, 2, 2),
}


@dataclass(frozen=True)
class Measured:
    """What all ranks found together, the same on each.

    Attributes:
        samples: side -> nanoseconds of the slowest rank, round by round.
        figures: the highest of all ranks.
        bytes: of the values.
    """

    samples: dict[str, list[float]]
    figures: dict[str, float]
    bytes: int


def measure(case: Case, setting: Setting) -> Measured:
    """Build, check and time a case. Collective.

    Raises:
        AssertionError: on every rank, if two sides leave different bits on one of them.
    """
    with torch.no_grad():
        work = case.make(setting)
        _check(work)
        samples = _timed(work, case, setting.size)
        medians = {name: statistics.median(found) for name, found in samples.items()}
        own = work.after(medians) if work.after is not None else {}
        figures = {name: _highest(value) for name, value in own.items()}
    return Measured(samples, figures, work.bytes)


def _timed(work: Work, case: Case, size: str) -> dict[str, list[float]]:
    seconds, least, most = BUDGETS[size]
    budget = (case.seconds if seconds is None else seconds) * 1e9
    names = list(work.sides)
    orders = balanced(len(names))
    samples: dict[str, list[float]] = {name: [] for name in names}
    spent = 0.0
    gc.collect()
    gc.freeze()  # what there is now is not looked at again before every sample
    gc.disable()
    try:
        for turn in range(most):
            # All ranks know the same times, so they stop in the same round.
            if turn >= least and spent > budget and turn % 2 == 0:
                break
            for k in orders[turn % len(orders)]:
                took = _sample(work.sides[names[k]])
                samples[names[k]].append(took)
                spent += took
    finally:
        gc.enable()
        gc.unfreeze()
    return samples


def _sample(call: Callable[[], object]) -> float:
    """Nanoseconds of the slowest rank, from a barrier on."""
    gc.collect()
    dist.barrier()
    start = time.perf_counter_ns()
    call()
    return _highest(time.perf_counter_ns() - start)


def _highest(value: float) -> float:
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _check(work: Work) -> None:
    """Every side must leave the same bytes as torch's; all ranks raise if one finds others."""
    expected: list[torch.Tensor] = []
    for name in ("torch", *(name for name in work.sides if name != "torch")):
        for tensor in work.results:
            tensor.zero_()
        dist.barrier()
        work.checked.get(name, work.sides[name])()
        if name == "torch":
            expected = [tensor.clone() for tensor in work.results]
            wrong = float(bool(expected) and not any(t.any() for t in expected))
        else:
            same = map(_same_bits, work.results, expected)
            wrong = float(not all(same))
        if _highest(wrong):
            raise AssertionError(f"{name} leaves other values than torch's side, or none")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
