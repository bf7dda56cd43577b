"""How a case is timed: our call and torch's alternate in one process, and medians are kept.

Two modes:

* **interleaved**: every round runs both sides once, and the order is swapped every round. Each
  side finds the caches as the other left them, and drift of the clock or of a noisy neighbour
  falls on both alike.
* **hot**: each side alone in a loop, first one, then the other, as a training loop that replays
  one plan would see it.

A sample is the time of ``inner`` calls divided by ``inner``; ``inner`` is 1 unless one call is
too short for the clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.cases import Case, Work

__all__ = ["Outcome", "Timing", "run_case"]

_clock = time.perf_counter_ns


@dataclass(frozen=True)
class Budget:
    """Limits on one case: seconds of measuring, and the least and most rounds."""

    seconds: float
    least: int
    most: int


FULL = Budget(seconds=3.0, least=9, most=600)
QUICK = Budget(seconds=0.7, least=5, most=200)


@dataclass(frozen=True)
class Timing:
    """Quartiles of the samples of one side, in nanoseconds a call."""

    median: float
    q1: float
    q3: float
    samples: int

    @property
    def iqr(self) -> float:
        return self.q3 - self.q1

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median=median, q1=q1, q3=q3, samples=len(samples))


@dataclass(frozen=True)
class Outcome:
    """One row of the result: both timings, the ratio with its spread, the target's verdict."""

    name: str
    what: str
    mode: str
    target: float
    bytes: int
    ours: Timing | None
    peer: Timing | None
    ratio: float
    ratio_q1: float
    ratio_q3: float
    verdict: str
    error: str = ""

    @property
    def ours_gbs(self) -> float:
        return self.bytes / self.ours.median if self.ours else 0.0

    @property
    def peer_gbs(self) -> float:
        return self.bytes / self.peer.median if self.peer else 0.0

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON, the derived columns included."""
        row = asdict(self)
        row["ours_gbs"] = round(self.ours_gbs, 3)
        row["peer_gbs"] = round(self.peer_gbs, 3)
        return row

    @classmethod
    def failed(cls, case: Case, error: BaseException) -> Outcome:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return cls(
            name=case.name, what=case.what, mode=case.mode, target=case.target, bytes=0,
            ours=None, peer=None, ratio=0.0, ratio_q1=0.0, ratio_q3=0.0,
            verdict="error", error=text,
        )  # fmt: skip


def run_case(case: Case, quick: bool = False) -> Outcome:
    """Build, check and time one case; an exception becomes a row with the verdict ``error``."""
    try:
        with torch.no_grad():
            work = case.make()
            _check(work)
            budget = QUICK if quick else FULL
            collecting = gc.isenabled()
            gc.collect()
            gc.disable()
            try:
                measure = _hot if case.mode == "hot" else _interleaved
                ours, peer = measure(work, budget)
            finally:
                if collecting:
                    gc.enable()
    except Exception as error:  # one broken case must not hide the figures of the others
        return Outcome.failed(case, error)

    timing, peer_timing = Timing.of(ours), Timing.of(peer)
    ratio = peer_timing.median / timing.median
    # In hot mode the two sides share no rounds, so the quartiles are paired the cautious way.
    if case.mode == "hot":
        q1, q3 = peer_timing.q1 / timing.q3, peer_timing.q3 / timing.q1
    else:
        rounds = Timing.of([theirs / own for own, theirs in zip(ours, peer, strict=True)])
        q1, q3 = rounds.q1, rounds.q3
    return Outcome(
        name=case.name, what=case.what, mode=case.mode, target=case.target, bytes=work.bytes,
        ours=timing, peer=peer_timing, ratio=ratio, ratio_q1=q1, ratio_q3=q3,
        verdict=verdict(ratio, q3, case.target),
    )  # fmt: skip


def verdict(ratio: float, ratio_q3: float, target: float) -> str:
    """``met``, ``missed``, or ``noise`` for a miss whose spread still reaches the target."""
    if ratio >= target:
        return "met"
    return "noise" if ratio_q3 >= target and ratio >= 0.9 * target else "missed"


def _check(work: Work) -> None:
    """Both sides must leave the same bits, or their times mean nothing."""
    work.peer()
    expected = [dst.clone() for dst in work.dsts]
    for dst in work.dsts:
        dst.zero_()
    work.ours()
    for index, (dst, bits) in enumerate(zip(work.dsts, expected, strict=True)):
        if not torch.equal(_raw(dst), _raw(bits)):
            raise AssertionError(f"destination {index} differs from torch's result")


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _timed(call: Callable[[], object], inner: int) -> float:
    if inner == 1:
        start = _clock()
        call()
        return float(_clock() - start)
    repeats = range(inner)
    start = _clock()
    for _ in repeats:
        call()
    return (_clock() - start) / inner


def _interleaved(work: Work, budget: Budget) -> tuple[list[float], list[float]]:
    for _ in range(3):
        work.ours()
        work.peer()
    ours: list[float] = []
    peer: list[float] = []
    stop = time.perf_counter() + budget.seconds
    for turn in range(budget.most):
        if turn >= budget.least and time.perf_counter() > stop:
            break
        if turn % 2:
            peer.append(_timed(work.peer, work.inner))
            ours.append(_timed(work.ours, work.inner))
        else:
            ours.append(_timed(work.ours, work.inner))
            peer.append(_timed(work.peer, work.inner))
    return ours, peer


def _hot(work: Work, budget: Budget) -> tuple[list[float], list[float]]:
    return tuple(_alone(call, budget) for call in (work.ours, work.peer))  # type: ignore[return-value]


def _alone(call: Callable[[], object], budget: Budget) -> list[float]:
    # Enough calls a sample for the clock's own cost (about 50 ns) to vanish.
    once = min(_timed(call, 1) for _ in range(5))
    inner = max(1, int(200_000 // max(once, 1.0)))
    samples: list[float] = []
    stop = time.perf_counter() + budget.seconds / 2
    for turn in range(budget.most):
        if turn >= budget.least and time.perf_counter() > stop:
            break
        samples.append(_timed(call, inner))
    return samples
