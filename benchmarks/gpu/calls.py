"""Works that many cases share: one copy or fill, with as many sets as it takes to miss the cache; lists."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import paramkit
from benchmarks.cases.registry import moved

from .device import Device
from .inputs import sets_beyond_cache
from .registry import Call, Pair, Work

__all__ = ["copies", "fills", "in_turn", "lists", "loop", "replay"]


def in_turn(calls: Sequence[Call]) -> Call:
    """One call that makes the next of `calls` each time."""
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def copies(make: Callable[[], Pair], gpu: Device) -> Work:
    """`copy_` of one tensor into another; `make` makes the pair, again for each further set."""
    first = make()
    size = moved([first[0]], [first[1]])
    sets = [first, *(make() for _ in range(sets_beyond_cache(size, gpu) - 1))]
    return Work(
        ours=in_turn([partial(paramkit.copy_, d, s) for d, s in sets]),
        peer=in_turn([partial(d.copy_, s) for d, s in sets]),
        dsts=[d for d, _ in sets],
        bytes=size,
        turns=len(sets),
        sets=sets,
        facts={"sets": len(sets)},
    )


def fills(make: Callable[[], Tensor], value: float, gpu: Device) -> Work:
    """`fill_` of one tensor; `make` makes it, again for each further set."""
    first = make()
    size = moved([first])
    dsts = [first, *(make() for _ in range(sets_beyond_cache(size, gpu) - 1))]
    return Work(
        ours=in_turn([partial(paramkit.fill_, d, value) for d in dsts]),
        peer=in_turn([partial(d.fill_, value) for d in dsts]),
        dsts=dsts,
        bytes=size,
        turns=len(dsts),
        facts={"sets": len(dsts)},
    )


def loop(dsts: Sequence[Tensor], srcs: Sequence[Tensor]) -> Call:
    """What people write: ``for dst, src in zip(dsts, srcs): dst.copy_(src)``."""

    def call() -> None:
        for dst, src in zip(dsts, srcs):
            dst.copy_(src)

    return call


def lists(dsts: list[Tensor], srcs: list[Tensor]) -> Work:
    """`foreach_copy_` of two lists, against `torch._foreach_copy_` and the loop."""
    return Work(
        ours=lambda: paramkit.foreach_copy_(dsts, srcs),
        peer=lambda: torch._foreach_copy_(dsts, srcs),
        dsts=dsts,
        bytes=moved(dsts, srcs),
        others={"loop": loop(dsts, srcs)},
        facts={"tensors": len(dsts)},
    )


def replay(dsts: list[Tensor], srcs: list[Tensor]) -> Work:
    """``plan(dsts, srcs).apply()``, against `torch._foreach_copy_`."""
    return Work(
        ours=paramkit.plan(dsts, srcs).apply,
        peer=lambda: torch._foreach_copy_(dsts, srcs),
        dsts=dsts,
        bytes=moved(dsts, srcs),
        keep=[srcs],
        facts={"tensors": len(dsts)},
    )
