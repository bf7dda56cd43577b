"""Tensors whose bytes are still elsewhere.

Compiling a plan needs names, shapes, dtypes and strides, not values. A `Lazy` has those, and gives its
bytes range by range when asked, so that a plan reads them into staging memory of a fixed size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .reading import StoredFile

__all__ = ["Lazy", "Stored", "StoredFile", "contiguous_strides", "in_a_row", "reach"]


class Lazy:
    """A strided CPU tensor of which only the description is in memory.

    The elements lie in a byte space of its own, [0, `nbytes`), the first one at byte 0: element (i, j) at
    byte `(i * stride(0) + j * stride(1)) * element_size()`. Where the tensor is not contiguous, the space
    is the span from its first to its last element, with what lies between.

    Args:
        shape: sizes, each >= 0.
        dtype: any dtype of whole bytes.
        strides: in elements, each >= 0; contiguous if left out.

    Attributes:
        shape: torch.Size.
        dtype: torch.dtype.
        strides: tuple of int, in elements.
        device: always the CPU.
        nbytes: bytes of the span. (A `torch.Tensor` of that shape that is not contiguous says
            `numel() * element_size()` instead.)

    Example:
        >>> Lazy((2, 3), torch.float16)
        Lazy((2, 3), torch.float16)
        >>> Lazy((2, 3), torch.float16, (8, 1)).nbytes
        22
    """

    __slots__ = ("__weakref__", "_numel", "dtype", "nbytes", "shape", "strides")

    device = torch.device("cpu")
    layout = torch.strided
    requires_grad = False

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        numel = self._numel = self.shape.numel()
        if strides is None:
            self.strides = contiguous_strides(self.shape)
            self.nbytes = numel * dtype.itemsize
        else:
            self.strides = tuple(strides)
            if len(self.strides) != len(self.shape) or any(step < 0 for step in self.strides):
                raise ValueError(f"strides {self.strides} do not fit shape {tuple(self.shape)}")
            self.nbytes = reach(self.shape, self.strides) * dtype.itemsize

    def stride(self, dim: int | None = None) -> tuple[int, ...] | int:
        """The strides in elements, or one of them."""
        return self.strides if dim is None else self.strides[dim]

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The sizes, or one of them."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """The number of elements."""
        return self._numel

    def element_size(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    def storage_offset(self) -> int:
        """Always 0: the byte space begins with the first element."""
        return 0

    def is_contiguous(self) -> bool:
        """Whether the elements lie in order without gaps (axes of size 1 do not count)."""
        return not self._numel or in_a_row(self.shape, self.strides)

    def read_into(self, begin: int, end: int, out: Tensor) -> None:
        """Read bytes [begin, end) of the byte space.

        Args:
            begin: first byte, 0 <= begin <= end.
            end: one behind the last byte, <= `nbytes`.
            out: CPU tensor, uint8, shape [end - begin], contiguous; every byte of it is written.

        Raises:
            SourceError: the bytes are not there any more.
            ValueError: a range outside the tensor, or another kind of `out`.
        """
        raise NotImplementedError

    def location(self) -> Hashable:
        """A key that two lazy tensors share only if they are the same bytes seen the same way.

        Tensors of one location are tied: they need not be read twice, or compared.
        """
        return (id(self),)

    def view(self, span: Tensor) -> Tensor:
        """The tensor, as a view of memory that its bytes were read into.

        Args:
            span: CPU tensor, uint8, shape [nbytes], contiguous, what `read_into(0, nbytes, span)` filled.
                Its memory must be aligned to `element_size()`.

        Returns:
            A tensor of this shape, dtype and these strides that shares memory with `span`.
        """
        if not self._numel:
            return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        return span.view(self.dtype).as_strided(self.shape, self.strides)

    def read_view(self, sizes: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
        """A part of the tensor: its span is read into new memory.

        Args:
            sizes, strides, offset: of the part, in elements from the first one of the tensor.

        Raises:
            SourceError: as `read_into`.
        """
        itemsize = self.dtype.itemsize
        span = torch.empty(reach(sizes, strides) * itemsize, dtype=torch.uint8)
        if len(span):
            self.read_into(offset * itemsize, offset * itemsize + len(span), span)
        return span.view(self.dtype).as_strided(tuple(sizes), tuple(strides), 0)

    def load(self) -> Tensor:
        """The tensor with its values, in new memory of `nbytes` bytes.

        Raises:
            SourceError: as `read_into`.
        """
        span = torch.empty(self.nbytes, dtype=torch.uint8)
        self.read_into(0, self.nbytes, span)
        return self.view(span)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __repr__(self) -> str:
        steps = "" if self.is_contiguous() else f", strides {self.strides}"
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}{steps})"

    def _check_range(self, begin: int, end: int, out: Tensor) -> None:
        if not 0 <= begin <= end <= self.nbytes:
            raise ValueError(
                f"bytes [{begin}, {end}) are not within the {self.nbytes} of the tensor"
            )
        if out.dtype != torch.uint8 or out.dim() != 1 or len(out) != end - begin:
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)}, expected torch.uint8 ({end - begin},)"
            )


class Stored(Lazy):
    """A tensor in a file.

    Args:
        file: the open file.
        offset: of the first element's first byte in the file.
        shape, dtype, strides: as for `Lazy`.

    Raises:
        SourceError: the tensor would reach beyond the end of the file.

    Example:
        >>> import os, tempfile
        >>> path = tempfile.mkstemp()[1]
        >>> _ = open(path, "wb").write(bytes(range(8)))
        >>> tensor = Stored(StoredFile(path), 2, (2, 2), torch.uint8, (3, 1))
        >>> tensor.load().tolist()
        [[2, 3], [5, 6]]
        >>> os.remove(path)
    """

    __slots__ = ("file", "offset")

    def __init__(
        self,
        file: StoredFile,
        offset: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__(shape, dtype, strides)
        self.file = file
        self.offset = offset
        if offset < 0 or offset + self.nbytes > file.size:
            raise file.fault(
                f"a tensor at bytes [{offset}, {offset + self.nbytes})",
                f"within the file's {file.size}",
            )

    def read_into(self, begin: int, end: int, out: Tensor) -> None:
        self._check_range(begin, end, out)
        self.file.read(self.offset + begin, out)

    def location(self) -> Hashable:
        return (self.file.identity, self.offset, self.dtype, self.shape, self.strides)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor of that shape whose elements lie in a row.

    >>> contiguous_strides((2, 3))
    (3, 1)
    """
    return _contiguous_strides(tuple(shape))


@lru_cache(maxsize=1 << 14)
def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def in_a_row(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements of a view lie in a row, in its own order; axes of size 1 do not count.

    >>> in_a_row((2, 1, 3), (3, 9, 1)), in_a_row((2, 3), (1, 2))
    (True, False)
    """
    row = contiguous_strides(sizes)
    return all(n == 1 or st == step for n, st, step in zip(sizes, strides, row))


def reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements there are from the first one of a view to its last one.

    >>> reach((2, 3), (5, 1))
    8
    """
    return 0 if 0 in sizes else 1 + sum((n - 1) * step for n, step in zip(sizes, strides))
