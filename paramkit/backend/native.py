"""The fallback: the same functions as the compiled extension, on PyTorch's own ``copy_`` and ``fill_``.

It is slower, not different: every check that the extension makes before the first write is made
here too, so that a call either writes everything or raises and writes nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import PlanError
from ..interrupts import shielded
from .checks import check_copy, check_fill, check_inplace, has_no_memory, tensor_list
from .claims import Claim, ranges_of, set_claims  # noqa: F401  as the extension has them

NAME = "native"
_local = threading.local()


def writes_done() -> int:
    """Writes done by this thread on this backend."""
    return getattr(_local, "writes", 0)


def _count(n: int = 1) -> None:
    _local.writes = getattr(_local, "writes", 0) + n


# --- operators -------------------------------------------------------------------------------


def copy_(dst: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    check_copy("copy_", None, dst, src)
    dst.copy_(src, non_blocking=non_blocking)
    _count()
    return dst


def fill_(dst: Tensor, value: Any) -> Tensor:
    check_fill("fill_", None, dst, value)
    dst.fill_(value)
    _count()
    return dst


def foreach_copy_(
    dsts: Sequence[Tensor], srcs: Sequence[Tensor], non_blocking: bool = False
) -> None:
    op = "foreach_copy_"
    dsts, srcs = tensor_list(op, "dsts", dsts), tensor_list(op, "srcs", srcs)
    if not dsts and not srcs:
        raise RuntimeError(f"{op}: Tensor list must have at least one tensor.")
    if len(dsts) != len(srcs):
        raise RuntimeError(
            f"{op}: Tensor lists must have the same number of tensors, got {len(dsts)} dsts and {len(srcs)} srcs"
        )
    for i, (dst, src) in enumerate(zip(dsts, srcs)):
        check_copy(op, i, dst, src)
    for dst, src in zip(dsts, srcs):
        dst.copy_(src, non_blocking=non_blocking)
    _count(len(dsts))


def foreach_fill_(dsts: Sequence[Tensor], values: Any) -> None:
    op = "foreach_fill_"
    dsts = tensor_list(op, "dsts", dsts)
    if not isinstance(values, (list, tuple)):
        values = [values] * len(dsts)
    if not dsts and not values:
        raise RuntimeError(f"{op}: Tensor list must have at least one tensor.")
    if len(values) != len(dsts):
        raise RuntimeError(
            f"{op}: expected one value, or one value a tensor: got {len(dsts)} dsts and {len(values)} values"
        )
    for i, (dst, value) in enumerate(zip(dsts, values)):
        check_fill(op, i, dst, value)
    for dst, value in zip(dsts, values):
        dst.fill_(value)
    _count(len(dsts))


def load_state_dict(model: torch.nn.Module, state_dict: Any, waits: bool) -> bool:
    """The extension's shortcut for plain models; this backend has none."""
    return False


# --- plan ------------------------------------------------------------------------------------


class Plan:
    """The compiled part of a plan, in Python: views made once, checks and writes in a loop.

    See :mod:`paramkit.plan` for the arguments; the extension's class has the same methods.
    """

    def __init__(
        self,
        dsts: list[Tensor],
        srcs: list[Tensor],
        writes: list[tuple[Any, ...]],
        guards: list[tuple[dict[str, Any], str, object]],
        follow_autograd: bool,
        ordered: bool,
    ) -> None:
        self._dsts, self._srcs, self._writes = list(dsts), list(srcs), list(writes)
        self._guards = list(guards)
        self._follow_autograd = follow_autograd
        self._seen = [_fingerprint(t) for t in self._dsts]
        self._seen_srcs = [_fingerprint(t) for t in self._srcs]
        self._memory = ranges_of(self._dsts), ranges_of(self._srcs)
        self._exchanges = self._runs = 0

    def families(self) -> list[str]:
        return ["native"] * len(self._writes)

    def replaced(self) -> list[int]:
        """Indices of the guards whose dict no longer holds the object planned for."""
        return [
            i for i, (table, key, value) in enumerate(self._guards) if table.get(key) is not value
        ]

    def moved(self) -> tuple[list[int], list[int]]:
        """Indices of destinations and of sources whose memory or layout changed since the plan was made."""
        orphans = set(self._orphans())
        return (
            [
                i
                for i, was in enumerate(self._seen)
                if i in orphans or _fingerprint(self._dsts[i]) != was
            ],
            [i for i, was in enumerate(self._seen_srcs) if _fingerprint(self._srcs[i]) != was],
        )

    def _orphans(self) -> list[int]:
        """Destinations that only this plan still keeps alive. What a model holds is told by `replaced`."""
        if not self._follow_autograd:
            return []
        orphan = _orphan_counts()
        return [i for i, counts in enumerate(_counts(self._dsts)) if counts in orphan]

    def destinations(self) -> list[Tensor]:
        return list(self._dsts)

    def sources(self) -> list[Tensor]:
        return list(self._srcs)

    def writes(self) -> list[tuple[Any, ...]]:
        return list(self._writes)

    def rebind(self, tensors: dict[str, Tensor], names: list[str]) -> bool:
        """Take new sources by name. True, and nothing taken, if one is missing or has another layout."""
        given = (tensors.get(name) for name in names)
        new = [t for t in given if isinstance(t, Tensor)]
        if len(new) < len(names) or any(
            _layout(t) != was[1] or (t.layout is torch.strided and has_no_memory(t))
            for t, was in zip(new, self._seen_srcs)
        ):
            return True
        if _may_share_memory(self._dsts, new):
            return True
        self._srcs = new
        self._seen_srcs = [_fingerprint(t) for t in new]
        self._memory = self._memory[0], ranges_of(new)
        return False

    def _views(self, i: int, *, detach: bool) -> tuple[Tensor, Tensor]:
        d, s, sizes, dst_strides, dst_offset, src_strides, src_offset = self._writes[i]
        dst, src = self._dsts[d], self._srcs[s]
        if detach:
            dst, src = dst.detach(), src.detach()
        if tuple(sizes) != tuple(dst.shape) or tuple(dst_strides) != dst.stride() or dst_offset:
            dst = dst.as_strided(sizes, dst_strides, dst.storage_offset() + dst_offset)
        if tuple(sizes) != tuple(src.shape) or tuple(src_strides) != src.stride() or src_offset:
            src = src.as_strided(sizes, src_strides, src.storage_offset() + src_offset)
        return dst, src

    def claim(self, doing: str = "write") -> Claim:
        """Keeps other threads from the memory of this plan while a block runs."""
        return Claim(*self._memory, doing)

    def run(self, progress: Callable[[int, int], object] | None = None) -> bool:
        """Write. False, and nothing written, if `replaced` or `moved` has something to say."""
        with self.claim():
            return self._run(progress)

    def _run(self, progress: Callable[[int, int], object] | None) -> bool:
        if self.replaced() or any(self.moved()):
            return False
        n = len(self._writes)
        # A forward-mode tangent is carried whatever the grad mode.
        follow = self._follow_autograd and (
            torch.is_grad_enabled() or forward_ad._current_level >= 0
        )
        if follow:
            pairs = [self._views(i, detach=False) for i in range(n)]
            for i, (dst, src) in enumerate(pairs):
                check_copy("apply", i, dst, src)
        else:
            for i, dst in enumerate(self._dsts):
                check_inplace(f"apply: dsts[{i}]", dst, False)
            pairs = [self._views(i, detach=True) for i in range(n)]
        total = sum(d.nbytes for d, _ in pairs)
        done = reported = 0
        self._runs += 1
        for dst, src in pairs:
            dst.copy_(src)
            done += dst.nbytes
            if progress is not None and (done - reported >= 32 << 20 or done == total):
                reported = done
                progress(done, total)
                if done < total and (self.replaced() or any(self.moved())):
                    raise moved_by_callback()
        _count(n)
        return True

    def exchange(self) -> bool:
        """Swap both sides of every write. False, and nothing written, as `run`.

        The caller knows that no memory is part of two sides. An interrupt is raised when all is done.

        Raises:
            ValueError: a write converts or repeats its source.
        """
        for d, s, sizes, _, _, src_strides, _ in self._writes:
            if self._dsts[d].dtype != self._srcs[s].dtype:
                raise ValueError("exchange: a write converts, and cannot be turned round")
            if any(n > 1 and st == 0 for n, st in zip(sizes, src_strides)):
                raise ValueError("exchange: a write repeats its source, and cannot be turned round")
        if self.replaced() or any(self.moved()):
            return False
        self._swap(range(len(self._writes)))
        return True

    def exchange_back(self) -> list[int]:
        """Swap again, also where a destination was replaced in its model.

        Returns:
            Indices of writes that were left, because the memory of one side is not what it was.
        """
        dsts, srcs = map(set, self.moved())
        left = [i for i, (d, s, *_) in enumerate(self._writes) if d in dsts or s in srcs]
        self._swap([i for i in range(len(self._writes)) if i not in set(left)])
        return left

    def _swap(self, numbers: Iterable[int]) -> None:
        """Swap some writes: all, or none where one fails. An interrupt is raised when all is done."""
        views = [self._views(i, detach=True) for i in numbers]
        swap = _Swap([block for dst, src in views for block in _blocks(dst, src)])

        done = self._exchanges + 1

        def go_on() -> None:
            try:
                swap.go_on()
            except Exception:
                try:
                    swap.turn_round()
                except BaseException:
                    shielded(swap.turn_round)
                    raise
                raise
            self._exchanges = done

        shielded(go_on)

    def exchanges(self) -> int:
        """How many exchanges were done: told apart from their calls, behind which an interrupt may come."""
        return self._exchanges

    def runs(self) -> int:
        """How many runs came to their first write: what fails before has written nothing."""
        return self._runs

    def verify(self) -> list[int]:
        """Indices of the writes whose destination does not hold what the source says."""
        differ = []
        for i in range(len(self._writes)):
            dst, src = self._views(i, detach=True)
            if not same_bits(dst, src):
                differ.append(i)
        return differ


def moved_by_callback() -> PlanError:
    """What is raised where the progress callback of a write takes the memory away."""
    return PlanError(
        "a tensor was replaced, moved or resized by the progress callback of the plan that writes it."
    )


class _Swap:
    """Pairs of tensors that are swapped one by one; may be interrupted anywhere, and goes on from there."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs
        self._kept = torch.empty(0)
        self._at = 0  # three stages a pair; each may be done twice

    def go_on(self) -> None:
        while self._at < 3 * len(self._pairs):
            pair, stage = divmod(self._at, 3)
            dst, src = self._pairs[pair]
            if stage == 0:
                self._kept = dst.clone()
            elif stage == 1:
                dst.copy_(src)
            else:
                src.copy_(self._kept)
            self._at += 1

    def turn_round(self) -> None:
        """Undo it stage by stage, after an error; that one may have been done too, or a part of it."""
        while self._at > 0:
            pair, stage = divmod(self._at, 3)
            if stage == 0:
                self._kept = self._pairs[pair - 1][1].clone()
            elif stage == 1:
                self._pairs[pair][0].copy_(self._kept)
            else:
                dst, src = self._pairs[pair]
                src.copy_(dst)
            self._at -= 1


def _blocks(dst: Tensor, src: Tensor, elements: int = 1 << 17) -> Iterator[tuple[Tensor, Tensor]]:
    """Two views of one shape, cut side by side into blocks of about so many elements."""
    if dst.numel() <= elements or not dst.dim():
        yield dst, src
        return
    axis = max(range(dst.dim()), key=lambda k: dst.shape[k])
    step = max(1, elements * dst.shape[axis] // dst.numel())
    for d, s in zip(torch.split(dst, step, axis), torch.split(src, step, axis)):
        yield from _blocks(d, s, max(elements, d.numel()))


def _may_share_memory(dsts: list[Tensor], srcs: list[Tensor]) -> bool:
    storages = {t.untyped_storage().data_ptr() for t in dsts if t.layout is torch.strided}
    return any(
        t.layout is torch.strided and t.untyped_storage().data_ptr() in storages for t in srcs
    )


def _counts(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    """Who holds each tensor: references to it and to its base, and tensors that share its storage."""
    return [
        (
            sys.getrefcount(tensors[i]),
            tensors[i]._use_count(),  # type: ignore[attr-defined]
            torch._C._storage_Use_Count(tensors[i].untyped_storage()._cdata)
            if tensors[i].layout is torch.strided
            else 0,
            sys.getrefcount(tensors[i]._base) if tensors[i]._base is not None else 0,
        )
        if type(tensors[i]) in (Tensor, torch.nn.Parameter)
        else ()
        for i in range(len(tensors))
    ]


@cache
def _orphan_counts() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The counts of a tensor that only a list holds, and of such a view, by looking at one of each."""
    with torch.inference_mode(False):  # there a view knows no base, and this is asked once
        return (_counts([torch.empty(2)])[0], _counts([torch.empty(2)[:1]])[0])


def _layout(t: Tensor) -> tuple[Any, ...]:
    strides = t.stride() if t.layout is torch.strided else None
    return (t.dtype, t.device, tuple(t.shape), strides, t.is_conj(), t.is_neg())


def _fingerprint(t: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Where a tensor's memory is, and its layout."""
    if t.layout is not torch.strided:
        return id(t), _layout(t)
    # A storage that was shrunk may lie where it lay before.
    return (t.data_ptr(), t.untyped_storage().nbytes()), _layout(t)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(dst: Tensor, src: Tensor, block: int = 1 << 22) -> bool:
    """Whether ``dst`` holds the bits that ``dst.copy_(src)`` gives; after a cast, any NaN equals any NaN.

    Works through blocks of about ``block`` elements, so that its temporaries stay small.
    """
    src = src.expand(dst.shape)
    if dst.numel() > block and dst.dim():
        axis = max(range(dst.dim()), key=lambda k: dst.shape[k])
        step = max(1, block * dst.shape[axis] // dst.numel())
        return all(
            same_bits(d, s, dst.numel())
            for d, s in zip(torch.split(dst, step, axis), torch.split(src, step, axis))
        )
    want = torch.empty(dst.shape, dtype=dst.dtype, device=dst.device)
    want.copy_(src)
    got = dst.contiguous()
    width = got.element_size()
    if got.numel() == 0:
        return True
    if got.dim() == 0:
        got, want = got.reshape(1), want.reshape(1)
    if got.stride(-1) != 1:  # a dimension of one element, of any stride, counts as contiguous
        got = got.clone(memory_format=torch.contiguous_format)
    bits = _BITS.get(width, torch.int64)
    equal = got.view(bits) == want.view(bits)
    if bool(equal.all()):
        return True
    if dst.dtype == src.dtype or not (got.is_floating_point() or got.is_complex()):
        return False
    if got.is_complex():
        got, want = torch.view_as_real(got), torch.view_as_real(want)
        equal = got.contiguous().view(_BITS[width // 2]) == want.contiguous().view(
            _BITS[width // 2]
        )
    return bool((equal | (got.isnan() & want.isnan())).all())
