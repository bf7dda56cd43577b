"""Cutting a tensor of any rank into boxes of bounded size, in row-major order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from torch import Tensor

__all__ = ["Box", "boxes", "cut"]

Box = tuple[tuple[int, int], ...]
"""(first index, number of indices) for each dimension."""


def boxes(shape: Sequence[int], elements: int) -> Iterator[Box]:
    """Boxes that cover a shape, each of at most `elements` elements, in row-major order.

    The elements of one box in row-major order, box after box, are those of the whole in row-major order. Boxes hold
    more than half of `elements`, but for the last of a row of them.

    Args:
        shape: the sizes; () is one element.
        elements: at least 1.

    Yields:
        (start, size) for each dimension; nothing where a size is 0.

    Example:
        >>> list(boxes((2, 3), 2))
        [((0, 1), (0, 2)), ((0, 1), (2, 1)), ((1, 1), (0, 2)), ((1, 1), (2, 1))]
    """
    if 0 in shape:
        return
    split, inner = len(shape), 1  # dimensions from `split` on are taken whole
    while split and inner * shape[split - 1] <= elements:
        split -= 1
        inner *= shape[split]
    whole = tuple((0, n) for n in shape[split:])
    if split == 0:
        yield whole
        return
    size, step = shape[split - 1], max(1, elements // inner)
    for outer in product(*map(range, shape[: split - 1])):
        single = tuple((i, 1) for i in outer)
        for start in range(0, size, step):
            yield (*single, (start, min(step, size - start)), *whole)


def cut(tensor: Tensor, box: Box) -> Tensor:
    """The view of `tensor` that a box of its shape stands for.

    Example:
        >>> import torch
        >>> cut(torch.arange(6).view(2, 3), ((1, 1), (0, 2)))
        tensor([[3, 4]])
    """
    for d, (start, size) in enumerate(box):
        if size != tensor.shape[d]:
            tensor = tensor.narrow(d, start, size)
    return tensor
