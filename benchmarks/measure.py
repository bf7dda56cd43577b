"""How a case is measured: built, checked bit for bit, timed in turns, and judged.

* **interleaved**: every round runs all sides once, in an order that changes every round. Drift of the
  clock or of a noisy neighbour falls on all alike.
* **hot**: each side alone in a loop, first one, then the other, as a training loop that replays one
  plan would see it.
* **memory**: not timed; see `benchmarks.memory`.

A sample is the time of ``inner`` calls divided by ``inner``, which is 1 unless one call is too short
for the clock. Figures are medians with quartiles. The garbage collector is off while rounds run.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks import memory, plain, rounds
from benchmarks.cases import Case, Work
from benchmarks.limits import Limits
from benchmarks.sides import sides_of
from benchmarks.targets import Figure, Verdict, judge, wanted

__all__ = ["BEYOND_CACHE", "Outcome", "Timing", "check", "run_case"]

BEYOND_CACHE = 32 * 1024 * 1024
"""Bytes moved from which a share of the memory's limit means something."""


@dataclass(frozen=True)
class Timing:
    """Quartiles of the samples of one side, in nanoseconds a call, and its bandwidth."""

    median: float
    q1: float
    q3: float
    samples: int
    gbs: float
    loop: str = ""

    @classmethod
    def of(cls, samples: list[float], bytes: int, loop: str = "") -> Timing:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples), bytes / median, loop)

    def as_dict(self) -> dict[str, object]:
        row: dict[str, object] = {
            "median_ns": round(self.median, 1),
            "q1_ns": round(self.q1, 1),
            "q3_ns": round(self.q3, 1),
            "samples": self.samples,
            "gbs": round(self.gbs, 3),
        }
        return row | ({"loop": self.loop} if self.loop else {})


@dataclass(frozen=True)
class Outcome:
    """One result: all sides, the figures that targets look at, the verdict."""

    case: Case
    verdict: Verdict
    bytes: int = 0
    sides: dict[str, Timing] = field(default_factory=dict)
    figures: dict[str, Figure | None] = field(default_factory=dict)
    limit_from: str = ""
    facts: dict[str, object] = field(default_factory=dict)

    def with_limit(self, gbs: float | None) -> Outcome:
        """With the run's own limit, where the case's rounds did not have one."""
        own = self.sides.get("paramkit")
        if gbs is None or own is None or "limit" in self.case.needs or self.figures.get("limit"):
            return self
        if self.bytes < BEYOND_CACHE:
            return self
        share = Figure(*(self.bytes / time / gbs for time in (own.median, own.q3, own.q1)))
        return replace(self, figures={**self.figures, "limit": share}, limit_from="run")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures = {name: figure and figure.as_dict() for name, figure in self.figures.items()}
        row: dict[str, Any] = {
            "name": self.case.name,
            "group": self.case.group,
            "what": self.case.what,
            "mode": self.case.mode,
            "bytes": self.bytes,
            "sides": {name: side.as_dict() for name, side in self.sides.items()},
            "ratio": figures.get("ratio"),
            "share_of_limit": figures.get("limit"),
            "share_of_ceiling": figures.get("ceiling"),
            "growth": figures.get("growth"),
            "targets": [target.as_dict() for target in self.case.targets],
            "wanted": wanted(self.case.targets),
            "verdict": self.verdict.word,
            "detail": self.verdict.detail,
        }
        if self.case.mode == "memory":
            row["temporary_bytes"] = self.facts.get("temporary_bytes")
        if self.limit_from:
            row["limit_from"] = self.limit_from
        return row | ({"facts": self.facts} if self.facts else {})


def run_case(
    case: Case, quick: bool = False, tiny: bool = False, limits: Limits | None = None
) -> Outcome:
    """Build, check and measure one case; an exception becomes an outcome with the verdict ``error``.

    Args:
        quick: small budgets, no numpy.
        tiny: tiny inputs and four rounds: what the tests run; its times mean nothing.
        limits: the limits of the run; None makes new ones.
    """
    try:
        with torch.no_grad():
            if case.mode == "memory":
                return _memory(case, tiny)
            return _timed(case, quick, tiny, limits or Limits())
    except Exception as error:  # one broken case must not hide the figures of the others
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return Outcome(case, verdict=Verdict("error", text))


def _timed(case: Case, quick: bool, tiny: bool, limits: Limits) -> Outcome:
    gc.collect()  # what the case before left in cycles may be gigabytes
    work = case.make(tiny)
    check(work, work.checked(numpy=not quick))
    sides = sides_of(case, work, limits, quick)
    budget = replace(rounds.FULL, seconds=case.seconds)
    if quick or tiny:
        budget = rounds.TINY if tiny else rounds.QUICK
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        samples = (rounds.hot if case.mode == "hot" else rounds.interleaved)(sides, budget)
    finally:
        if collecting:
            gc.enable()

    timings = {
        name: Timing.of(samples[name], side.bytes, side.loop) for name, side in sides.items()
    }
    figures: dict[str, Figure | None] = {"ratio": _against(samples, "torch", case.mode)}
    own = timings["paramkit"]
    figures["seconds"] = Figure(*(time / 1e9 for time in (own.median, own.q1, own.q3)))
    if "half" in samples:
        figures["growth"] = _growth(samples)
    for name in sorted({"ceiling", "limit"} & ({*case.needs, *samples})):
        figures[name] = _against(samples, name, case.mode, sides["paramkit"].bytes, sides)
    if "limit" in samples:
        limits.add(case.limit, samples["limit"])
    verdict = judge(case.targets, figures)
    if verdict.word == "unknown" and plain.why_not():
        verdict = replace(verdict, detail=f"{verdict.detail} ({plain.why_not()})")
    return Outcome(
        case=case,
        verdict=verdict,
        bytes=work.bytes,
        sides=timings,
        figures=figures,
        limit_from="rounds" if "limit" in samples else "",
        facts=work.facts,
    )


def _against(
    samples: dict[str, list[float]],
    name: str,
    mode: str,
    bytes: int = 1,
    sides: Any = None,
) -> Figure | None:
    """How paramkit's bandwidth compares with that of the side `name`: above 1 it is faster."""
    if name not in samples:
        return None
    ours, theirs = samples["paramkit"], samples[name]
    # A side that moves other bytes (the limit's 256 MiB) is compared by bandwidth.
    scale = bytes / sides[name].bytes if sides else 1.0
    value = scale * statistics.median(theirs) / statistics.median(ours)
    if mode == "hot":
        # The sides share no rounds, so the quartiles are paired the cautious way.
        low, _, high = statistics.quantiles(ours, n=4, method="inclusive")
        their_low, _, their_high = statistics.quantiles(theirs, n=4, method="inclusive")
        return Figure(value, scale * their_low / high, scale * their_high / low)
    paired = [scale * their / own for own, their in zip(ours, theirs, strict=True)]
    q1, _, q3 = statistics.quantiles(paired, n=4, method="inclusive")
    return Figure(value, q1, q3)


def _growth(samples: dict[str, list[float]]) -> Figure:
    """Our time over that for half as much: 2 where cost grows linearly."""
    whole, half = samples["paramkit"], samples["half"]
    q1, _, q3 = statistics.quantiles(
        [own / part for own, part in zip(whole, half, strict=True)], n=4, method="inclusive"
    )
    return Figure(statistics.median(whole) / statistics.median(half), q1, q3)


def _memory(case: Case, tiny: bool) -> Outcome:
    found = memory.measure(case.name, tiny)
    used = float(found.paramkit)
    figures: dict[str, Figure | None] = {"memory": Figure(used, used, used)}
    return Outcome(
        case=case,
        bytes=found.bytes,
        figures=figures,
        verdict=judge(case.targets, figures),
        facts={
            "temporary_bytes": {"paramkit": found.paramkit, "torch": found.torch},
            **asdict(found),
        },
    )


def check(work: Work, others: list[Callable[[], object]]) -> None:
    """Every side must leave the same bytes as torch, around the views too, or times mean nothing."""
    raw = _storages(work)
    _zero(raw)
    work.peer()
    expected = [each.clone() for each in raw]
    for call in others:
        _zero(raw)
        call()
        for index, (found, bits) in enumerate(zip(raw, expected, strict=True)):
            if not torch.equal(found, bits):
                raise AssertionError(f"destination {index} differs from torch's result")


def _storages(work: Work) -> list[torch.Tensor]:
    """The memory of the destinations as bytes, each once."""
    storages = {dst.untyped_storage().data_ptr(): dst.untyped_storage() for dst in work.dsts}
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]


def _zero(raw: list[torch.Tensor]) -> None:
    for each in raw:
        each.zero_()
