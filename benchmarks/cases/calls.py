"""Works that many cases share: one copy, one fill, a list, each with the same call of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .registry import Work, moved

__all__ = ["copy", "fill", "lists", "loop", "numpy_copy"]

# A copy of equal dtypes is a copy of bits: numpy may call them integers.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _numpy(tensor: Tensor, bits: bool) -> np.ndarray | None:
    try:
        return tensor.view(_BITS[tensor.element_size()]).numpy() if bits else tensor.numpy()
    except (TypeError, KeyError):  # a dtype that numpy does not have
        return None


def numpy_copy(dst: Tensor, src: Tensor) -> Callable[[], object] | None:
    """`numpy.copyto` on the same memory, or None where numpy does not have the dtypes."""
    same = dst.dtype == src.dtype
    to, source = _numpy(dst, same), _numpy(src, same)
    if to is None or source is None:
        return None
    return lambda: np.copyto(to, source, casting="unsafe")


def copy(dst: Tensor, src: Tensor, inner: int = 1) -> Work:
    """One tensor to one tensor, with a conversion if the dtypes differ."""
    import paramkit

    dense = dst.is_contiguous() and src.is_contiguous() and dst.dtype == src.dtype
    return Work(
        ours=lambda: paramkit.copy_(dst, src),
        peer=lambda: dst.copy_(src),
        dsts=[dst],
        bytes=moved([dst], [src]),
        inner=inner,
        numpy=numpy_copy(dst, src),
        dense=(dst, src) if dense else None,
    )


def fill(dst: Tensor, value: float, inner: int = 1) -> Work:
    """One number into one dense tensor."""
    import paramkit

    to = dst.numpy()
    return Work(
        ours=lambda: paramkit.fill_(dst, value),
        peer=lambda: dst.fill_(value),
        dsts=[dst],
        bytes=moved([dst]),
        inner=inner,
        numpy=lambda: to.fill(value),
        dense=(dst, None),
    )


def lists(dsts: list[Tensor], srcs: list[Tensor]) -> Work:
    """Two lists, against `torch._foreach_copy_` of the same lists."""
    import paramkit

    return Work(
        ours=lambda: paramkit.foreach_copy_(dsts, srcs),
        peer=lambda: torch._foreach_copy_(dsts, srcs),
        dsts=dsts,
        bytes=moved(dsts, srcs),
    )


def loop(dsts: Sequence[Tensor], srcs: Sequence[Tensor]) -> Work:
    """Two lists, against the loop of `dst.copy_(src)` that people write."""
    import paramkit

    to, source = list(dsts), list(srcs)

    def peer() -> None:
        for dst, src in zip(to, source, strict=True):
            dst.copy_(src)

    return Work(
        ours=lambda: paramkit.foreach_copy_(to, source),
        peer=peer,
        dsts=to,
        bytes=moved(to, source),
    )
