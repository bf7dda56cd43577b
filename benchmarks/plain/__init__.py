"""Plain copies, fills and comparisons in C, the benchmark's own: what memory can do here.

A `Loop` is one way to copy or fill: libc's, or streaming stores of some width. A `Compare` is one way to
read two streams: libc's, or vectors of some width. `best` tries all of them on given memory and keeps the
fastest, so that the figure to be measured by is not a slow one.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .build import NoCompilerError, compiled

__all__ = [
    "COMPARISONS",
    "KINDS",
    "Compare",
    "Loop",
    "NoCompilerError",
    "Pairs",
    "available",
    "best",
    "candidates",
    "comparisons",
    "why_not",
]

KINDS = ("libc", "streaming 16 bytes", "streaming 32 bytes", "streaming 64 bytes")

COMPARISONS = (
    "libc",
    *(f"{width} bytes{how}" for width in (16, 32, 64) for how in ("", " and a prefetch")),
)

NEAR = 256 * 1024
"""Bytes below which streaming is not tried: nobody streams what fits a near cache."""

ALONE = 4 * NEAR
"""Bytes up to which one thread is tried as well as all of them."""


@dataclass(frozen=True)
class Loop:
    """A kind of plain C copy or fill (`src` None) between two dense tensors, on so many threads."""

    kind: int
    dst: Tensor
    src: Tensor | None
    threads: int
    value: int = 1
    own_pool: bool = False

    @property
    def name(self) -> str:
        return KINDS[self.kind]

    @property
    def bytes(self) -> int:
        """Bytes read plus bytes written."""
        written = self.dst.numel() * self.dst.element_size()
        return written if self.src is None else 2 * written

    def __call__(self, times: int = 1) -> None:
        """Do it `times` times inside C: the call from Python is paid once."""
        size = self.dst.numel() * self.dst.element_size()
        to, pool = self.dst.data_ptr(), int(self.own_pool)
        if self.src is None:
            compiled().plain_fill(self.kind, to, self.value, size, self.threads, times, pool)
        else:
            source = self.src.data_ptr()
            compiled().plain_copy(self.kind, to, source, size, self.threads, times, pool)


@dataclass(frozen=True)
class Compare:
    """A plain C comparison of all bytes of two dense tensors of equal size, on so many threads."""

    kind: int
    first: Tensor
    second: Tensor
    threads: int
    own_pool: bool = False

    @property
    def name(self) -> str:
        return COMPARISONS[self.kind]

    @property
    def bytes(self) -> int:
        """Bytes read."""
        return 2 * self.first.numel() * self.first.element_size()

    def __call__(self, times: int = 1) -> bool:
        """Do it `times` times inside C; whether they are equal. It never stops early."""
        sides = (self.first.data_ptr(), self.second.data_ptr(), self.bytes // 2)
        return not compiled().plain_compare(
            self.kind, *sides, self.threads, times, int(self.own_pool)
        )


AnyLoop = TypeVar("AnyLoop", Loop, Compare)


@dataclass(frozen=True)
class Pairs:
    """Many small writes in a plain C loop: `runs` of `run` bytes a pair, `dst_step` and `src_step` apart.

    With the pointers ready and a locked increment a pair, as a version counter costs: the floor of any
    list call that keeps autograd informed.
    """

    dsts: list[Tensor]
    srcs: list[Tensor]
    runs: int
    run: int
    dst_step: int = 0
    src_step: int = 0

    @property
    def name(self) -> str:
        return "pairs"

    @property
    def bytes(self) -> int:
        """Bytes read plus bytes written."""
        return 2 * len(self.dsts) * self.runs * self.run

    @cached_property
    def _memory(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pointers = [
            np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uintp)
            for tensors in (self.dsts, self.srcs)
        ]
        return pointers[0], pointers[1], np.zeros(64 * len(self.dsts), dtype=np.uint8)

    def __call__(self, times: int = 1) -> None:
        """Do it `times` times inside C."""
        to, source, counters = (array.ctypes.data for array in self._memory)
        steps = (self.runs, self.run, self.dst_step, self.src_step)
        compiled().plain_pairs(to, source, len(self.dsts), *steps, counters, times)


@cache
def why_not() -> str:
    """Why there is no plain C here; empty where there is."""
    try:
        compiled()
    except NoCompilerError as error:
        return str(error)
    return ""


def available() -> bool:
    return not why_not()


def candidates(dst: Tensor, src: Tensor | None, kinds: str = "all") -> list[Loop]:
    """Every loop that this machine has; `kinds` "libc" leaves the streaming ones out."""
    if not dst.is_contiguous() or not (src is None or src.is_contiguous()):
        raise ValueError("plain copies are of dense tensors")
    threads = torch.get_num_threads()
    size = dst.numel() * dst.element_size()
    counts = {threads, 1} if size <= ALONE else {threads}
    chosen = range(len(KINDS)) if kinds == "all" and size >= NEAR else (0,)
    return [
        Loop(kind=kind, dst=dst, src=src, threads=count)
        for kind in chosen
        if compiled().plain_has(kind)
        for count in sorted(counts)
    ]


def comparisons(first: Tensor, second: Tensor) -> list[Compare]:
    """Every comparison that this machine has, on all threads."""
    if not first.is_contiguous() or not second.is_contiguous():
        raise ValueError("plain comparisons are of dense tensors")
    threads = torch.get_num_threads()
    found = [Compare(kind, first, second, threads) for kind in range(len(COMPARISONS))]
    return [loop for loop in found if compiled().plain_has_compare(loop.kind)]


def best(loops: list[AnyLoop], rounds: int = 5) -> AnyLoop:
    """The fastest of `loops` by the median of a short interleaved trial."""
    samples: list[list[float]] = [[] for _ in loops]
    for turn in range(rounds + 1):
        for index, loop in enumerate(loops):
            start = time.perf_counter_ns()
            loop()
            if turn:  # the first touches the pages
                samples[index].append(time.perf_counter_ns() - start)
    medians = [statistics.median(times) for times in samples]
    return loops[medians.index(min(medians))]
