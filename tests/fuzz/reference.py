"""An arena in memory, the views of a list in it, and what torch makes of the list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.cases import DTYPES
from tests.fuzz.generate import Scale, View, Write, WriteList

__all__ = ["Arena", "Prepared", "prepare"]


class Arena:
    """Bytes that the views of list after list lie in, from some bytes behind a multiple of 64 on."""

    def __init__(self, scale: Scale, shift: int = 0) -> None:
        whole = np.zeros(scale.bytes + 128, np.uint8)
        first = -whole.ctypes.data % 64 + shift
        self.bytes = whole[first : first + scale.bytes]
        self._memory = memoryview(self.bytes)
        raw = torch.from_numpy(self.bytes)
        self._typed = {dtype: raw.view(dtype) for dtype in DTYPES}

    def view(self, view: View) -> Tensor:
        return self._typed[view.dtype].as_strided(view.shape, view.strides, view.offset)

    def set(self, start: bytes) -> None:
        self._memory[:] = start

    def get(self) -> bytes:
        return self._memory.tobytes()


@dataclass
class Prepared:
    """A list with its views, what the arena holds when torch has done it, and what torch raised."""

    list: WriteList
    writes: list[Write]  # those that are left of it
    dsts: list[Tensor]
    srcs: list[Tensor | int | float | complex]
    want: bytes
    torch: bytes  # what torch leaves, which of a list that it refuses has written the beginning
    error: type[Exception] | None


def torch_write(write: Write, dst: Tensor, src: Tensor | int | float | complex) -> None:
    if write.fill:
        dst.fill_(src)
    else:
        dst.copy_(src)


def onto_itself(write: Write) -> bool:
    """Whether every element is copied to where it is.

    torch refuses it where strides of axes with one element differ. They mean nothing to a plan, which takes it
    (tests/test_conflicts.py).
    """
    dst, src = write.dst, write.src
    if not isinstance(src, View) or write.fill:
        return False
    return (dst.dtype, dst.offset, dst.shape) == (src.dtype, src.offset, src.shape) and all(
        a == b for n, a, b in zip(dst.shape, dst.strides, src.strides) if n > 1
    )


def prepare(arena: Arena, each: WriteList) -> Prepared | None:
    """The list as torch does it, write after write; None if nothing is left of it.

    Writes that torch refuses are left out, so that most lists are done to their end. A list that keeps them
    must raise what torch raises first, and write nothing. (Of a plan's, one refused for nothing is left out.)
    """
    arena.set(each.start)
    left, dsts, srcs = [], [], []
    error: type[Exception] | None = None
    for write in each.writes:
        dst = arena.view(write.dst)
        src = arena.view(write.src) if isinstance(write.src, View) else write.src
        if error is None:
            try:
                torch_write(write, dst, src)
            except Exception as raised:  # its type is the answer
                if not each.keeps_errors or (each.how == "plan" and onto_itself(write)):
                    continue
                error = type(raised)
        left.append(write)
        dsts.append(dst)
        srcs.append(src)
    if not left:
        return None
    did = arena.get()
    want = did if error is None or each.how == "each" else each.start
    return Prepared(each, left, dsts, srcs, want, did, error)


def reach(
    prepared: Prepared, of: Callable[[Write], View | int | float | complex]
) -> list[np.ndarray]:
    """For each write, whether each byte of the arena belongs to a side of it."""
    result = []
    for write in prepared.writes:
        view = of(write)
        mask = np.zeros(len(prepared.list.start), bool)
        if isinstance(view, View):
            size = view.dtype.itemsize
            whole = mask[: len(mask) // size * size].reshape(-1, size)
            index = np.arange(len(whole))[view.offset :]
            if 0 not in view.shape:
                strides = tuple(8 * step for step in view.strides)
                whole[np.lib.stride_tricks.as_strided(index, view.shape, strides)] = True
        result.append(mask)
    return result


def conflict(prepared: Prepared) -> bool:
    """Whether the order of the writes matters, or one writes an element twice: what plans refuse."""
    dsts = reach(prepared, lambda write: write.dst)
    srcs = reach(prepared, lambda write: write.src)
    for i, mine in enumerate(dsts):
        for j, (dst, src) in enumerate(zip(dsts, srcs)):
            if (i != j and (mine & dst).any()) or (mine & src).any():
                return True
    return any(
        mine.sum() != np.prod(write.dst.shape) * write.dst.dtype.itemsize
        for mine, write in zip(dsts, prepared.writes)
    )
