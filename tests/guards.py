"""Guard bytes around every destination, and the comparison with torch.

A write that strays by one byte inside a larger storage is seen by no sanitizer, so the tests place
destinations inside patterned storages and compare every byte afterwards.

* :func:`place` builds a view of any strides inside a patterned storage;
* :func:`watch` and :func:`nothing_written` compare whole storages before and after;
* :func:`bits` reads a tensor's own bytes without running a copy kernel;
* :func:`outcome` turns a call into "the type of what it raised, or None", to compare with torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "MARGIN",
    "Layout",
    "Watch",
    "assert_same_bits",
    "assert_same_storage",
    "bits",
    "contiguous_strides",
    "elements",
    "nothing_written",
    "outcome",
    "place",
    "random_layout",
    "random_shape",
    "random_source",
    "storage_bytes",
    "watch",
]

MARGIN = 67
"""Elements of pattern in front of a placed view and behind it; odd, so that nothing is aligned."""


def storage_bytes(tensor: Tensor) -> Tensor:
    """The tensor's whole storage as a live uint8 tensor ``[nbytes]``."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def elements(tensor: Tensor) -> Tensor:
    """Storage indices of the tensor's elements, in logical order, ``[numel]``."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    numbers = torch.arange(count)
    return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of the tensor's elements in logical order, ``[numel, itemsize]`` uint8.

    Gathered from the storage by index: no copy kernel of the tensor's own dtype runs.
    """
    size = tensor.element_size()
    raw = storage_bytes(tensor)
    # Without an index for each element, and by numpy: torch may be patched.
    if tensor.is_contiguous():
        start = tensor.storage_offset() * size
        copy = raw[start : start + tensor.numel() * size].numpy().copy()
        return torch.from_numpy(copy).view(tensor.numel(), size)
    whole = raw[: raw.numel() // size * size].view(-1, size)
    return whole[elements(tensor)]


def _is_nan(tensor: Tensor) -> Tensor:
    """Where a tensor ``[numel]`` is NaN, real and imaginary parts side by side for complex."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.is_complex():
        # A NaN in one part says nothing about the other, so each part counts by itself.
        return torch.view_as_real(flat.to(torch.complex128)).isnan()
    return flat.to(torch.float64).isnan().unsqueeze(1)


def assert_same_bits(
    got: Tensor, expected: Tensor, *, any_nan: bool = False, what: str = ""
) -> None:
    """Equal shape, dtype and bytes; with ``any_nan`` a NaN equals any NaN (as after a cast)."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} is not {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: {got.shape} is not {expected.shape}"
    equal = bits(got) == bits(expected)
    if any_nan and got.numel() and (got.is_floating_point() or got.is_complex()):
        parts = 2 if got.is_complex() else 1
        equal = equal.view(got.numel(), parts, -1).all(-1)
        equal = equal | (_is_nan(got) & _is_nan(expected))
    wrong = (~equal.reshape(got.numel(), -1).all(-1)).nonzero().flatten() if got.numel() else []
    assert len(wrong) == 0, (
        f"{what}: {len(wrong)} of {got.numel()} elements differ, first at {int(wrong[0])}: "
        f"got bytes {bits(got)[wrong[0]].tolist()}, expected {bits(expected)[wrong[0]].tolist()} "
        f"({got.dtype}, shape {tuple(got.shape)}, strides {got.stride()})"
    )


def assert_same_storage(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Every byte of two storages is equal, those outside the views included."""
    wrong = (storage_bytes(got) != storage_bytes(expected)).nonzero().flatten()
    assert len(wrong) == 0, (
        f"{what}: {len(wrong)} bytes of the storage differ, first at byte {int(wrong[0])} "
        f"(view: {got.dtype}, shape {tuple(got.shape)}, strides {got.stride()}, "
        f"offset {got.storage_offset()})"
    )


# Placing views.


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a dense tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Layout:
    """Where a view lies: shape and strides in elements, its offset, the length of its storage."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    length: int

    @classmethod
    def dense(cls, shape: Sequence[int], strides: Sequence[int] | None = None) -> Layout:
        """A view with ``MARGIN`` elements of pattern before and behind it."""
        strides = tuple(contiguous_strides(shape) if strides is None else strides)
        reach = sum((n - 1) * step for n, step in zip(shape, strides, strict=True) if n)
        return cls(tuple(shape), strides, MARGIN, MARGIN + reach + 1 + MARGIN)


def place(layout: Layout, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """A view laid out so, inside a storage of pattern bytes, or of random bytes given a seed.

    The same arguments give the same bytes, so two calls make twins: one for torch, one for us.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.empty(layout.length * size, dtype=torch.uint8)
    if seed is None:
        # 1..251 repeats with a prime period, so that a shifted write cannot look right.
        raw.copy_(torch.arange(raw.numel()) % 251 + 1)
        if dtype == torch.bool:
            raw.remainder_(2)
    else:
        generator = torch.Generator().manual_seed(seed)
        top = 2 if dtype == torch.bool else 256
        raw.copy_(torch.randint(0, top, raw.shape, generator=generator, dtype=torch.uint8))
    empty = torch.empty(0, dtype=dtype)
    return empty.set_(raw.untyped_storage(), layout.offset, layout.shape, layout.strides)


def random_shape(rng: random.Random, most: int = 6) -> tuple[int, ...]:
    """A shape of rank 0 to ``most`` and at most a few thousand elements; now and then empty."""
    rank = rng.randint(0, most)
    largest = {0: 1, 1: 700, 2: 40, 3: 12, 4: 7, 5: 4, 6: 3}[rank]
    shape = [rng.randint(1, largest) for _ in range(rank)]
    if rank and rng.random() < 0.3:
        shape[rng.randrange(rank)] = rng.choice((1, 2, 8, 16, 17, 31, 33, 64))
    if rank and rng.random() < 0.04:
        shape[rng.randrange(rank)] = 0
    return tuple(shape)


def random_layout(rng: random.Random, shape: Sequence[int]) -> Layout:
    """The shape permuted, narrowed and stepped at random; no two elements share memory."""
    rank = len(shape)
    order = list(range(rank))
    if rng.random() < 0.6:
        rng.shuffle(order)
    strides, offset, step = [0] * rank, 0, 1
    for axis in reversed(order):
        stepping = rng.choice((1, 1, 1, 2, 3)) if rng.random() < 0.4 else 1
        before, behind = (rng.randint(0, 2), rng.randint(0, 2)) if rng.random() < 0.4 else (0, 0)
        strides[axis] = step * stepping
        offset += step * before
        step *= before + max(shape[axis], 1) * stepping + behind
    first = rng.randint(0, MARGIN)
    return Layout(tuple(shape), tuple(strides), first + offset, first + step + MARGIN)


def random_source(rng: random.Random, shape: Sequence[int]) -> Layout:
    """A layout that broadcasts to the shape: axes of one, stride 0, missing leading axes."""
    shape = list(shape)
    if rng.random() < 0.3:
        for axis in range(len(shape)):
            if rng.random() < 0.4 and shape[axis] != 0:
                shape[axis] = 1
        while shape and shape[0] == 1 and rng.random() < 0.5:
            shape.pop(0)
    layout = random_layout(rng, shape)
    if rng.random() < 0.15:
        strides = tuple(0 if rng.random() < 0.5 else step for step in layout.strides)
        layout = Layout(layout.shape, strides, layout.offset, layout.length)
    return layout


# Watching storages.


class Watch:
    """A snapshot of every byte of the storages of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._before = [storage_bytes(tensor).clone() for tensor in self._tensors]

    def assert_unwritten(self) -> None:
        """No byte of any storage changed."""
        for index, (tensor, before) in enumerate(zip(self._tensors, self._before, strict=True)):
            changed = (storage_bytes(tensor) != before).nonzero().flatten()
            assert len(changed) == 0, f"tensor {index}: {len(changed)} bytes were written"

    def assert_only_inside(self) -> None:
        """No byte outside the views' own elements changed."""
        inside: dict[int, Tensor] = {}
        for tensor in self._tensors:
            raw = storage_bytes(tensor)
            mask = inside.setdefault(raw.data_ptr(), torch.zeros_like(raw, dtype=torch.bool))
            size = tensor.element_size()
            mask[: raw.numel() // size * size].view(-1, size)[elements(tensor)] = True
        for index, (tensor, before) in enumerate(zip(self._tensors, self._before, strict=True)):
            raw = storage_bytes(tensor)
            stray = ((raw != before) & ~inside[raw.data_ptr()]).nonzero().flatten()
            assert len(stray) == 0, (
                f"tensor {index}: {len(stray)} bytes outside the view were written, "
                f"first at byte {int(stray[0])}"
            )


def watch(*tensors: Tensor) -> Watch:
    """Snapshot the whole storage of each tensor now."""
    return Watch(tensors)


@contextmanager
def nothing_written(*tensors: Tensor) -> Iterator[None]:
    """On leaving the block, every byte of the tensors' storages is what it was.

    Put ``pytest.raises`` inside: ``with nothing_written(dst), pytest.raises(RuntimeError): ...``
    """
    snapshot = Watch(tensors)
    yield
    snapshot.assert_unwritten()


def outcome(call: Callable[[], object]) -> type[Exception] | None:
    """The type of what the call raised, or None when it returned."""
    try:
        call()
    except Exception as error:  # the type is the answer
        return type(error)
    return None
