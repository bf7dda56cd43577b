"""The sides of a case: paramkit, torch, and where they apply half, numpy, libc, the ceiling, the
limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import plain
from benchmarks.cases import Case, Work
from benchmarks.limits import Limits

__all__ = ["SIDES", "Side", "sides_of"]

SIDES = ("paramkit", "torch", "half", "numpy", "libc", "ceiling", "limit")

_clock = time.perf_counter_ns


@dataclass(frozen=True)
class Side:
    """A call to be timed: `bytes` moved by one of it, `inner` of it in a sample.

    A `batched` call does all `inner` repetitions itself, in C.
    """

    name: str
    call: Callable[..., object]
    bytes: int
    inner: int = 1
    batched: bool = False
    loop: str = ""

    def sample(self, inner: int | None = None) -> float:
        """Nanoseconds of one call, the mean of `inner` in a row."""
        count = inner or self.inner
        call = self.call
        if self.batched:
            start = _clock()
            call(count)
            return (_clock() - start) / count
        if count == 1:
            start = _clock()
            call()
            return float(_clock() - start)
        repeats = range(count)
        start = _clock()
        for _ in repeats:
            call()
        return (_clock() - start) / count


def _plain(name: str, loop: plain.Loop | plain.Compare | plain.Pairs, inner: int = 1) -> Side:
    return Side(name, loop, loop.bytes, inner, batched=True, loop=loop.name)


def _ceiling(work: Work) -> Side:
    """A plain copy that reads and writes as many bytes in all as the case, in memory of its own."""
    half = work.bytes // 2
    dst, src = (torch.ones(half, dtype=torch.uint8) for _ in range(2))
    return _plain("ceiling", plain.best(plain.candidates(dst, src)))


def sides_of(case: Case, work: Work, limits: Limits, quick: bool) -> dict[str, Side]:
    """The sides in their order; without a C compiler the plain ones are left out, quick runs have
    no numpy."""
    side = partial(Side, bytes=work.bytes, inner=work.inner)
    found = [side("paramkit", work.ours), side("torch", work.peer)]
    if case.mode == "interleaved":
        if work.half is not None:
            found.append(Side("half", work.half, work.bytes // 2, work.inner))
        if work.numpy is not None and not quick:
            found.append(side("numpy", work.numpy))
        if plain.available():
            if work.dense is not None:
                loops = plain.candidates(*work.dense, kinds="libc")
                found.append(_plain("libc", plain.best(loops), work.inner))
            if "ceiling" in case.needs:
                found.append(_ceiling(work))
            loop = limits.loop(case.limit) if "limit" in case.needs else None
            if loop is not None:
                found.append(_plain("limit", loop))
    if work.pairs is not None and plain.available():
        found.append(_plain("ceiling", work.pairs))
    return {each.name: each for each in found}
