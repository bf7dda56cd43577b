"""Views inside patterned storages on any device, and the comparison of whole storages there.

As `tests/guards.py`, whose layouts and messages these use; the bytes are compared on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

import paramkit
from tests import guards
from tests.guards import Layout

__all__ = [
    "assert_as_torch",
    "assert_same_storage",
    "counted",
    "few",
    "mixed",
    "moved",
    "noise",
    "on_host",
    "place",
    "raw",
    "small_numbers",
    "twin",
]

T = TypeVar("T")


def few(cases: Iterable[T], device: torch.device, every: int) -> list[T]:
    """All cases on a GPU; every so many where the kernels run on the host, a thread at a time."""
    return list(cases)[:: 1 if device.type == "cuda" else every]


def raw(tensor: Tensor) -> Tensor:
    """The tensor's whole storage as a live uint8 tensor, where it is."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.detach().untyped_storage())


def _view_of(storage: Tensor, like: Tensor) -> Tensor:
    """The bytes of a storage, seen as another tensor sees its own."""
    empty = torch.empty(0, dtype=like.dtype, device=storage.device)
    return empty.set_(storage.untyped_storage(), like.storage_offset(), like.shape, like.stride())


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same view of a copy of the whole storage, on a device."""
    copy = torch.empty(raw(tensor).shape, dtype=torch.uint8, device=device)
    return _view_of(copy.copy_(raw(tensor)), tensor)


def twin(tensor: Tensor) -> Tensor:
    """The same view of a copy of the whole storage: one for torch, one for us."""
    return moved(tensor, tensor.device)


def on_host(tensor: Tensor) -> Tensor:
    return moved(tensor, "cpu")


def place(
    layout: Layout, dtype: torch.dtype, device: torch.device | str, seed: int | None = None
) -> Tensor:
    """As `guards.place`: a view laid out so, in a storage of pattern bytes, or of random ones given a seed."""
    return moved(guards.place(layout, dtype, seed), device)


def noise(count: int, device: torch.device, seed: int = 1) -> Tensor:
    """Random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).to(device)


def small_numbers(source: Tensor) -> Tensor:
    """Set all of a tensor's storage to numbers from 0 to 6: in range for every dtype. Returns the tensor."""
    count = source.untyped_storage().nbytes() // source.element_size()
    numbers = torch.arange(count, device=source.device).remainder_(7).to(source.dtype)
    raw(source)[: count * source.element_size()].copy_(numbers.view(torch.uint8))
    return source


def mixed(count: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Contiguous, transposed, rows, casts and broadcasts in turn; destinations in patterned storages."""
    dsts, srcs = [], []
    for i in range(count):
        n = 5 + i % 40
        src = torch.rand(3 * n, n, device=device)
        kind = i % 5
        layout = Layout.dense((n, 3 * n)) if kind == 1 else Layout.dense((3 * n, n), (n + kind, 1))
        dsts.append(place(layout, torch.bfloat16 if kind == 3 else torch.float32, device))
        srcs.append(src.t() if kind == 1 else src[:1, :1] if kind == 4 else src)
    return dsts, srcs


def assert_same_storage(
    got: Tensor, want: Tensor, what: str = "", *, any_nan: bool = False
) -> None:
    """Every byte of two storages is equal, those outside the views included.

    With `any_nan` a NaN inside the views equals any NaN, as after a cast.
    """
    if torch.equal(raw(got), raw(want)):
        return
    got, want = on_host(got), on_host(want)
    if not any_nan:
        guards.assert_same_storage(got, want, what)
    guards.assert_same_bits(got, want, any_nan=True, what=what)
    seen = guards.watch(want)
    raw(want).copy_(raw(got))
    seen.assert_only_inside()


def assert_as_torch(
    pairs: Iterable[tuple[str, Tensor, Tensor]], what: str, *, any_nan: bool = False
) -> None:
    """One list of (name, destination, source) copied by us, and pair by pair by torch: all bytes are equal.

    A NaN equals any NaN after a cast, or with `any_nan`.
    """
    pairs = list(pairs)
    wants = [twin(dst) for _, dst, _ in pairs]
    for want, (_, _, src) in zip(wants, pairs, strict=True):
        want.copy_(src)
    paramkit.foreach_copy_([dst for _, dst, _ in pairs], [src for _, _, src in pairs])
    for want, (name, dst, src) in zip(wants, pairs, strict=True):
        label = f"{what}: {name}, {src.dtype} -> {dst.dtype}"
        assert_same_storage(dst, want, label, any_nan=any_nan or dst.dtype != src.dtype)


def counted(call: Callable[[], object]) -> dict[str, int]:
    """What a call adds to the counts of launches, uploads and staged bytes."""
    extension = paramkit.backend.active()
    before = extension.cuda_counts()
    call()
    return {name: n - before[name] for name, n in extension.cuda_counts().items()}
