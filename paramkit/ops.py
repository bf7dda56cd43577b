"""The four drop-in operators. Each follows the torch function that it is named after, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import backend
from .backend.checks import tensor_list
from .typing import Number

# NOTE: [Compiling] While torch.compile traces, each operator is torch's own, one call a tensor: the
# compiler fuses them itself, and needs no graph break. What is no list of the right length is refused
# there too.

__all__ = ["copy_", "fill_", "foreach_copy_", "foreach_fill_"]

_T = TypeVar("_T", bound=Tensor)


def copy_(dst: _T, src: Tensor, non_blocking: bool = False) -> _T:
    """Copy the values of ``src`` into ``dst`` and return ``dst``: ``Tensor.copy_``, faster.

    Args:
        dst: the tensor written, of any shape, dtype and strides; keeps its storage and dtype.
        src: the values; broadcast to ``dst.shape`` and converted to ``dst.dtype``.
        non_blocking: as in ``Tensor.copy_``; means nothing between CPU tensors.

    Returns:
        ``dst`` itself.

    Raises:
        RuntimeError: a shape that does not broadcast, a leaf that requires grad written with grad
            mode on, an expanded ``dst``, ``dst`` and ``src`` that overlap partly.
        NotImplementedError: a conversion that torch does not have, or a ``src`` on the meta device.
        TypeError: an argument that is not a tensor.

    As in torch, a write into a ``dst`` on the meta device does nothing.

    >>> import torch, paramkit
    >>> paramkit.copy_(torch.zeros(2, 2), torch.tensor([1.0, 2.0]))
    tensor([[1., 2.],
            [1., 2.]])
    """
    if torch.compiler.is_compiling():
        dst.copy_(src, non_blocking=non_blocking)
        return dst
    written: _T = backend.active().copy_(dst, src, non_blocking)
    return written


def fill_(dst: _T, value: Number | Tensor) -> _T:
    """Set every element of ``dst`` to ``value`` and return ``dst``: ``Tensor.fill_``, faster.

    Args:
        dst: the tensor written, of any shape, dtype and strides.
        value: a number, or a tensor of shape ``()``; converted to ``dst.dtype``.

    Returns:
        ``dst`` itself.

    Raises:
        RuntimeError: a number that ``dst.dtype`` cannot hold, a ``value`` tensor that is not 0-dim,
            a leaf that requires grad written with grad mode on.
        TypeError: an argument of another type.

    >>> import torch, paramkit
    >>> weight = torch.zeros(2, 3)
    >>> _ = paramkit.fill_(weight[:, 1:2], 0.5)
    >>> weight
    tensor([[0.0000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.0000]])
    """
    if torch.compiler.is_compiling():
        dst.fill_(value)  # type: ignore[arg-type]
        return dst
    written: _T = backend.active().fill_(dst, value)
    return written


def foreach_copy_(
    dsts: Sequence[Tensor], srcs: Sequence[Tensor], non_blocking: bool = False
) -> None:
    """Copy each ``srcs[i]`` into ``dsts[i]``: ``torch._foreach_copy_``, for any mix of tensors.

    Dtypes, strides, ranks and devices may differ from pair to pair. The result is that of the loop
    ``for d, s in zip(dsts, srcs): d.copy_(s)``, also where tensors share memory, but every pair is
    checked before the first is written: on an error nothing has been written.

    Args:
        dsts: n tensors of any shape, written in place.
        srcs: n tensors; each broadcasts to the shape of its destination and is converted to its dtype.
        non_blocking: as in ``Tensor.copy_``.

    Raises:
        RuntimeError: empty lists, lists of different lengths, and what :func:`copy_` raises.
        TypeError: an entry that is not a tensor.

    >>> import torch, paramkit
    >>> a, b = torch.zeros(2), torch.zeros(2, 2, dtype=torch.bfloat16)
    >>> paramkit.foreach_copy_([a, b], [torch.ones(2), torch.tensor(3.0)])
    >>> a, b
    (tensor([1., 1.]), tensor([[3., 3.],
            [3., 3.]], dtype=torch.bfloat16))
    """
    if torch.compiler.is_compiling():
        _check_lists("foreach_copy_", dsts, srcs, "srcs")
        for dst, src in zip(dsts, srcs):
            dst.copy_(src, non_blocking=non_blocking)
        return
    backend.active().foreach_copy_(dsts, srcs, non_blocking)


def foreach_fill_(
    dsts: Sequence[Tensor], values: Number | Tensor | Sequence[Number | Tensor]
) -> None:
    """Fill each ``dsts[i]`` with one number, or with ``values[i]``.

    Args:
        dsts: n tensors of any shape, dtype and strides (slices are welcome).
        values: one number, one 0-dim tensor, or a list of n of them in any mixture.

    Raises:
        RuntimeError: empty lists, lists of different lengths, and what :func:`fill_` raises.
        TypeError: an entry of another type.

    >>> import torch, paramkit
    >>> weights = [torch.zeros(2, 2), torch.zeros(1, 2, dtype=torch.int64)]
    >>> paramkit.foreach_fill_([w[:, 0:1] for w in weights], [0.5, 7])
    >>> weights
    [tensor([[0.5000, 0.0000],
            [0.5000, 0.0000]]), tensor([[7, 0]])]
    """
    if torch.compiler.is_compiling():
        tensor_list("foreach_fill_", "dsts", dsts)
        each = values if isinstance(values, (list, tuple)) else [values] * len(dsts)
        _check_lists("foreach_fill_", dsts, each, "values")
        for dst, value in zip(dsts, each):
            dst.fill_(value)
        return
    backend.active().foreach_fill_(dsts, values)


def _check_lists(op: str, dsts: Sequence[object], others: Sequence[object], name: str) -> None:
    """Two lists of one length, or what the backends raise."""
    tensor_list(op, "dsts", dsts)
    tensor_list(op, name, others)
    if not dsts and not others:
        raise RuntimeError(f"{op}: Tensor list must have at least one tensor.")
    if len(dsts) != len(others):
        raise RuntimeError(
            f"{op}: lists must have the same length, got {len(dsts)} dsts and {len(others)} {name}"
        )
