"""How a GPU case is measured: built, checked bit for bit, counted, timed in turns, and judged.

The sides of a case take turns, in an order that changes every round, so that a change of the clock
rates falls on all alike. The ratio comes from the case's own clock; the other one is sampled a few times
beside it. Figures are medians with quartiles. The garbage collector is off while rounds run.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import rounds
from benchmarks.measure import Outcome, Timing
from benchmarks.targets import Figure, Verdict, judge

from .check import check, count, differing
from .clocks import Side
from .compiled import Compiler
from .device import Device
from .limits import Limits
from .registry import CLOCKS, Case, Work

__all__ = ["Measured", "ratio", "run_case", "share", "without_figures"]

Samples = dict[str, list[float]]

FEW = rounds.Budget(seconds=0.2, least=3, most=9)
"""For the clock that no ratio is taken from."""


@dataclass(frozen=True)
class Measured:
    """The result of one case; the limit comes last, when all of the run is known."""

    outcome: Outcome
    also: dict[str, Timing]

    def judged(self, limits: Limits) -> Measured:
        """With the share of the limit, and the verdict."""
        outcome = self.outcome
        case, own = outcome.case, outcome.sides.get("paramkit")
        if own is None:
            return self
        gbs = limits.gbs(case.limit)
        figures = {**outcome.figures, "limit": share(own, outcome.bytes, gbs) if gbs else None}
        judged = replace(outcome, figures=figures, verdict=judge(case.targets, figures))
        return replace(self, outcome=judged)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: a row as `benchmarks` writes it, and how the GPU was timed."""
        case: Any = self.outcome.case
        other = next(name for name in CLOCKS if name != case.clock)
        return self.outcome.as_dict() | {
            "clock": case.clock,
            "peer": case.peer,
            "limit": case.limit,
            "also": {
                "clock": other,
                "sides": {name: timing.as_dict() for name, timing in self.also.items()},
            },
        }


def _as_any(case: Case) -> Any:
    """`Outcome` is written for the cases of the CPU; ours have the fields that it looks at."""
    return case


def without_figures(case: Case, verdict: Verdict) -> Measured:
    """A case that was not measured, and why."""
    return Measured(Outcome(_as_any(case), verdict), {})


def run_case(
    case: Case, gpu: Device, compiler: Compiler | None, budget: rounds.Budget, tiny: bool = False
) -> Measured:
    """Build, check and time one case; an exception becomes the verdict ``error``."""
    try:
        with torch.no_grad():
            return _timed(case, gpu, compiler, budget, tiny)
    except Exception as error:  # one broken case must not hide the figures of the others
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return without_figures(case, Verdict("error", text))
    finally:
        gc.collect()
        with contextlib.suppress(RuntimeError):  # after an error that CUDA does not recover from
            gpu.forget()


def _timed(
    case: Case, gpu: Device, compiler: Compiler | None, budget: rounds.Budget, tiny: bool
) -> Measured:
    work = case.make(tiny, gpu)
    check(work, gpu)
    facts = {**work.facts, **count(case, work)}
    calls = {"paramkit": work.ours, "torch": work.peer, **work.others}
    if case.compile and compiler is not None:
        compiled = compiler.copy(work.sets)
        if not isinstance(compiled, str):
            wrong = differing(work, {"compiled": compiled}, gpu)
            calls.update({} if wrong else {"compiled": compiled})
            compiled = wrong.get("compiled", "")
        if compiled:
            facts["left_out"] = {"compiled": compiled}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        timings: dict[str, Timing] = {}
        samples = _rounds(calls, case.clock, work, gpu, budget, timings)
        other = next(name for name in CLOCKS if name != case.clock)
        both = {name: calls[name] for name in ("paramkit", "torch")}
        few = replace(FEW, seconds=min(FEW.seconds, budget.seconds))
        also: dict[str, Timing] = {}
        if not case.staged:  # there the host is busy until the end: both clocks say the same
            _rounds(both, other, work, gpu, few, also)
    finally:
        if collecting:
            gc.enable()
    outcome = Outcome(
        case=_as_any(case),
        verdict=Verdict("unknown", "not judged yet"),
        bytes=work.bytes,
        sides=timings,
        figures={"ratio": ratio(samples)},
        facts=facts,
    )
    return Measured(outcome, also)


def _rounds(
    calls: Mapping[str, Callable[[], object]],
    clock: str,
    work: Work,
    gpu: Device,
    budget: rounds.Budget,
    timings: dict[str, Timing],
) -> Samples:
    """Samples of all sides in turns; their quartiles go into `timings`."""
    sides: dict[str, Any] = {
        name: Side(name, call, gpu, clock, work.bytes, work.turns) for name, call in calls.items()
    }
    for side in sides.values():
        side.prepare()
    samples = rounds.interleaved(sides, budget)
    timings.update({name: Timing.of(samples[name], work.bytes) for name in sides})
    return samples


def ratio(samples: Samples) -> Figure:
    """Torch's time over ours, with the quartiles of the rounds' own ratios."""
    ours, theirs = samples["paramkit"], samples["torch"]
    paired = [their / own for own, their in zip(ours, theirs, strict=True)]
    q1, _, q3 = statistics.quantiles(paired, n=4, method="inclusive")
    return Figure(statistics.median(theirs) / statistics.median(ours), q1, q3)


def share(own: Timing, bytes: int, gbs: float) -> Figure:
    """Our bandwidth over the limit's."""
    return Figure(*(bytes / time / gbs for time in (own.median, own.q3, own.q1)))
