"""A further side: ``dst.copy_(src)`` compiled by torch.compile, where that works and as long as there is time."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .calls import in_turn
from .device import Device
from .registry import Call, Pair

__all__ = ["Compiler"]


def _copy(dst: Tensor, src: Tensor) -> None:
    dst.copy_(src)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _compile() -> Callable[[Tensor, Tensor], object]:
    """`_copy`, to be compiled at its first call, for the shapes of that call alone."""
    # Here, and not in worker processes: starting those takes longer than one kernel.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch._dynamo.reset()  # or the shapes of earlier cases make it compile for any shape
    return torch.compile(_copy, fullgraph=True, dynamic=False)


class Compiler:
    """torch.compile, with so many seconds for all cases together."""

    def __init__(self, gpu: Device, seconds: float) -> None:
        self._gpu = gpu
        self._left = seconds

    def copy(self, sets: list[Pair]) -> Call | str:
        """A compiled copy of each pair in turn, or why there is none."""
        if not _has_triton():
            return "triton is not installed"
        if self._left <= 0:
            return "no time left for torch.compile"
        start = self._gpu.now()
        try:
            compiled = _compile()
            calls: list[Call] = [partial(compiled, d, s) for d, s in sets]
            for call in calls:
                call()
            self._gpu.synchronize()
            return in_turn(calls)
        except Exception as error:  # a missing C compiler, a dtype that triton does not know, ...
            return f"torch.compile: {type(error).__name__}: {error}".splitlines()[0][:200]
        finally:
            self._left -= (self._gpu.now() - start) / 1e9
