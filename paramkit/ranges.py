"""The bytes that writes read of a file, without the gaps between them.

A part of each row of a matrix, as a rank of tensor parallelism reads it, is many short runs of bytes with long
gaps. Such runs are read without the gaps, and lie packed in memory: `packed` says which rows of bytes those are,
and how the writes find their elements among them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .resolve import Write
from .sources.lazy import Stored
from .sources.reading import GAP, Range

__all__ = ["Packed", "Rows", "bytes_of", "loops", "packed", "ranges_of"]


class Rows(NamedTuple):
    """So many rows of `run` bytes of a source, one every `step` bytes from byte `begin` on."""

    begin: int
    run: int
    rows: int = 1
    step: int = 0


class Loop(NamedTuple):
    """A loop around runs: the axis of the write, its turns, and the bytes from one to the next."""

    axis: int
    turns: int
    step: int


class Packed(NamedTuple):
    """What some writes read together.

    Attributes:
        rows: in the order of the source. Nothing is in two of them.
        bytes: of all rows.
        writes: the same writes, of the rows' bytes one after the other in memory; None where strides cannot
            say how they would have to be read there.
        apart: whether no byte is read by two of the writes, the short gaps that each reads along included.
    """

    rows: list[Rows]
    bytes: int
    writes: list[Write] | None
    apart: bool


def loops(write: Write, itemsize: int) -> tuple[int, list[Loop]]:
    """The bytes of a run that a write reads, and the loops around it whose gaps are left out, outermost first.

    Gaps of less than `GAP` bytes are part of a run.

    >>> loops(Write(0, 0, (2, 3, 512), (1536, 512, 1), 0, (9000, 1000, 1), 0), 4)
    (2048, [Loop(axis=0, turns=2, step=36000), Loop(axis=1, turns=3, step=4000)])
    >>> loops(Write(0, 0, (3, 512), (512, 1), 0, (520, 1), 0), 4)
    (6208, [])
    """
    axes = zip(write.src_strides, write.sizes, range(len(write.sizes)), strict=True)
    run = itemsize
    around: list[Loop] = []
    for stride, turns, axis in sorted(axes):
        step = stride * itemsize
        if turns == 1 or step == 0:
            continue
        if not around and step - run < GAP:
            run += (turns - 1) * step
        else:
            around.append(Loop(axis, turns, step))
    return run, around[::-1]


def bytes_of(write: Write, itemsize: int) -> int:
    """How many bytes a write reads, with short gaps, at most.

    >>> bytes_of(Write(0, 0, (2, 3, 512), (1536, 512, 1), 0, (9000, 1000, 1), 0), 4)
    12288
    """
    total, around = loops(write, itemsize)
    span = total + sum((loop.turns - 1) * loop.step for loop in around)
    for loop in around:
        total *= loop.turns
    return min(total, span)


def packed(writes: Sequence[Write], itemsize: int) -> Packed:
    """What some writes of one source read.

    Args:
        writes: at least one, none of them empty.
        itemsize: bytes of an element of the source.

    Example: columns 2 and 3 of eight, in three rows of 4 KiB a column.

    >>> made = packed([Write(0, 0, (3, 2048), (2048, 1), 0, (8192, 1), 2048)], 4)
    >>> made.rows, made.bytes
    ([Rows(begin=8192, run=8192, rows=3, step=32768)], 24576)
    >>> made.writes[0].src_strides, made.writes[0].src_offset
    ((2048, 1), 0)
    """
    around = [loops(write, itemsize) for write in writes]
    begins = [
        _begins(write.src_offset * itemsize, outer)
        for write, (_, outer) in zip(writes, around, strict=True)
    ]
    runs = [run for run, _ in around]
    first, length = _joined(begins, runs, GAP)
    # Where each row lies in memory.
    at = np.cumsum(length) - length
    found = []
    for write, own, (_, outer) in zip(writes, begins, around, strict=True):
        row = np.searchsorted(first, own, side="right") - 1
        found.append(_with_strides(write, at[row] + own - first[row], outer, itemsize))
    moved = [write for write in found if write is not None]
    apart = len(writes) == 1
    if not apart:
        each = sum(int(_joined([own], [run], 0)[1].sum()) for own, run in zip(begins, runs))
        apart = each == int(_joined(begins, runs, 0)[1].sum())
    return Packed(
        _rows(first, length),
        int(length.sum()),
        moved if len(moved) == len(found) else None,
        apart,
    )


def ranges_of(source: Stored, rows: Sequence[Rows], out: Tensor) -> Iterator[Range]:
    """Rows of a tensor as ranges of its file, to be read into `out`, one row after the other.

    Args:
        out: uint8, 1-d, of all rows' bytes.
    """
    at = 0
    for begin, run, count, step in rows:
        some = out[at : at + count * run]
        at += count * run
        if count == 1:
            yield source.offset + begin, some
        else:
            yield source.offset + begin, some.view(count, run), step


def _begins(offset: int, around: Sequence[Loop]) -> Any:
    """The first byte of each run, shape: the turns of the loops."""
    begins: Any = np.array(offset, dtype=np.int64)
    for loop in around:
        begins = begins[..., None] + np.arange(loop.turns, dtype=np.int64) * loop.step
    return begins


def _joined(begins: Sequence[Any], runs: Sequence[int], gap: int) -> tuple[Any, Any]:
    """(first bytes, lengths) of all runs in order; those with less than `gap` bytes between them are one."""
    begin = np.concatenate([own.ravel() for own in begins])
    end = np.concatenate([own.ravel() + run for own, run in zip(begins, runs)])
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], np.maximum.accumulate(end[order])
    new: Any = np.flatnonzero(begin[1:] - end[:-1] >= max(gap, 1)) + 1
    first = begin[np.concatenate(([0], new))]
    return first, end[np.concatenate((new - 1, [len(end) - 1]))] - first


def _with_strides(write: Write, at: Any, around: Sequence[Loop], itemsize: int) -> Write | None:
    """A write whose runs lie at these bytes (shape: the turns of the loops), if strides can say that."""
    strides = list(write.src_strides)
    origin = int(at[(0,) * at.ndim])
    said: Any = np.array(origin, dtype=np.int64)
    for k, loop in enumerate(around):
        second = (0,) * k + (1,) + (0,) * (at.ndim - k - 1)
        step = int(at[second]) - origin
        strides[loop.axis] = step // itemsize
        said = said[..., None] + np.arange(loop.turns, dtype=np.int64) * step
    if not np.array_equal(said, at):
        return None
    return replace(write, src_strides=tuple(strides), src_offset=origin // itemsize)


def _rows(first: Any, length: Any) -> list[Rows]:
    """Runs in order as few rows: those of one length, at equal distances."""
    step = np.diff(first)
    alike = length[1:] == length[:-1]
    # Numbers k where run k + 1 does not go on as run k went on from the one before.
    turns = (np.flatnonzero((step[1:] != step[:-1]) | ~alike[1:]) + 1).tolist()
    rows, k = [], 0
    while k < len(first):
        if k + 1 == len(first) or not alike[k]:
            rows.append(Rows(int(first[k]), int(length[k])))
            k += 1
            continue
        turn = bisect_left(turns, k + 1)
        last = turns[turn] if turn < len(turns) else len(first) - 1
        rows.append(Rows(int(first[k]), int(length[k]), last - k + 1, int(step[k])))
        k = last + 1
    return rows
