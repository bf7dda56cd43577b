"""Tensors of any rank in boxes of bounded size, and the reading of a box that lies scattered in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from torch import Tensor

from .sources.lazy import Lazy

__all__ = ["Box", "boxes", "cut", "gather"]

Box = tuple[tuple[int, int], ...]
"""(first index, number of indices) for each dimension."""

# What lies between the wanted elements of a file is read too, if it is no more than this many times as much.
SPREAD = 8
FEW = 4096  # bytes, which cost the same to read as one


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


def gather(tensor: Lazy, begin: int, strides: Sequence[int], out: Tensor, scratch: Tensor) -> None:
    """Read elements of a lazy tensor, in ranges that fit into `scratch` and hold little else.

    Args:
        tensor: the lazy tensor.
        begin: the first element's place in its byte space, in elements.
        strides: in elements, each >= 0; element i of `out` is the one at `begin + i * strides`.
        out: CPU tensor of an integer dtype of the same element size, contiguous.
        scratch: CPU tensor, uint8, at least one element long.

    Raises:
        SourceError: as `Lazy.read_into`.

    Example:
        >>> import os, tempfile, torch
        >>> from paramkit.sources import Stored, StoredFile
        >>> path = tempfile.mkstemp()[1]
        >>> _ = open(path, "wb").write(bytes(range(6)))
        >>> out = torch.empty(3, 2, dtype=torch.uint8)
        >>> stored = Stored(StoredFile(path), 0, (2, 3), torch.uint8)
        >>> gather(stored, 0, (1, 3), out, torch.empty(6, dtype=torch.uint8))
        >>> out.tolist()
        [[0, 3], [1, 4], [2, 5]]
        >>> os.remove(path)
    """
    size = tensor.element_size()
    reach = [(n - 1) * step for n, step in zip(out.shape, strides)]
    span = (1 + sum(reach)) * size
    if span <= len(scratch) and span <= max(FEW, SPREAD * out.numel() * size):
        raw = scratch[:span]
        tensor.read_into(begin * size, begin * size + span, raw)
        out.copy_(raw.view(out.dtype).as_strided(out.shape, tuple(strides)))
        return
    widest = max(range(out.dim()), key=reach.__getitem__)
    half = out.shape[widest] // 2
    gather(tensor, begin, strides, out.narrow(widest, 0, half), scratch)
    second = out.narrow(widest, half, out.shape[widest] - half)
    gather(tensor, begin + half * strides[widest], strides, second, scratch)
