"""The fallback: the same functions as the compiled extension, on PyTorch's own ``copy_`` and ``fill_``.

It is slower, not different: every check that the extension makes before the first write is made
here too, so that a call either writes everything or raises and writes nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

NAME = "native"
_local = threading.local()


def writes_done() -> int:
    """Writes done by this thread on this backend."""
    return getattr(_local, "writes", 0)


def _count(n: int = 1) -> None:
    _local.writes = getattr(_local, "writes", 0) + n


# --- checks, all made before the first write -------------------------------------------------


@cache
def conversion_error(dst: torch.dtype, src: torch.dtype) -> Exception | None:
    """What torch raises when it copies ``src`` into ``dst`` (None when it can), found by trying one element."""
    import warnings

    try:
        with warnings.catch_warnings():  # complex -> real warns at the real copy, not at this probe
            warnings.simplefilter("ignore")
            torch.empty(1, dtype=dst).copy_(torch.empty(1, dtype=src))
    except Exception as error:  # whatever torch raises is the answer
        return error
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a dense strided CPU tensor of exactly torch's own class."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _describe(op: str, index: int | None) -> tuple[str, str, str]:
    if index is None:
        return op, "dst", "src"
    return op, f"dsts[{index}]", f"srcs[{index}]"


def _check_inplace(where: str, dst: Tensor, differentiable: bool) -> None:
    if dst.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{where} is an inference tensor, and inplace update to an inference tensor outside "
            "InferenceMode is not allowed: clone it, or write inside torch.inference_mode()"
        )
    if not (differentiable and torch.is_grad_enabled()):
        return
    if dst.requires_grad and dst.is_leaf:
        raise RuntimeError(
            f"{where}: a leaf Variable that requires grad is being used in an in-place operation; "
            "write under torch.no_grad()"
        )
    base = dst._base
    if base is not None and base.requires_grad and base.is_leaf:
        raise RuntimeError(
            f"{where}: a view of a leaf Variable that requires grad is being used in an in-place "
            "operation; write under torch.no_grad()"
        )


def _overlap_partially(a: Tensor, b: Tensor) -> bool:
    """torch's own rule (ATen/MemoryOverlap): only dense tensors of one storage are judged."""
    if a is b or a.numel() == 0 or b.numel() == 0:
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if not (_dense(a) and _dense(b)):
        return False
    a0, b0 = a.data_ptr(), b.data_ptr()
    a1, b1 = a0 + a.nbytes, b0 + b.nbytes
    if (a0, a1) == (b0, b1):
        return a.stride() != b.stride()
    return a0 < b1 and b0 < a1


def _dense(t: Tensor) -> bool:
    """As torch's is_non_overlapping_and_dense: a permutation of a contiguous tensor."""
    expected = 1
    for stride, size in sorted((st, n) for n, st in zip(t.shape, t.stride()) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _has_shape(t: Tensor) -> bool:
    """Whether the shape of a tensor is what it says, and may be asked for."""
    return not (
        t.is_nested
        or isinstance(t, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer))
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def has_zero_stride(t: Tensor) -> bool:
    """Whether several elements of ``t`` certainly share memory (an expanded tensor)."""
    return any(st == 0 and n > 1 for n, st in zip(t.shape, t.stride()))


def broadcast_error(dst: Sequence[int], src: Sequence[int]) -> bool:
    """Whether a source of shape ``src`` does not broadcast to the shape ``dst``."""
    if len(src) > len(dst):
        return True
    return any(s not in (1, d) for d, s in zip(reversed(dst), reversed(src)))


def check_copy(op: str, index: int | None, dst: Any, src: Any) -> None:
    """Raise what ``dst.copy_(src)`` would raise, as far as it can be known beforehand."""
    name, d, s = _describe(op, index)
    for arg, value in ((d, dst), (s, src)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor as {arg}, got {type(value).__name__}")
    if src.device.type == "meta" and dst.device.type != "meta":
        raise NotImplementedError(
            f"{name}: Cannot copy out of meta tensor; no data! {s} is on the meta device; "
            "load its values first"
        )
    plain = is_plain(dst) and is_plain(src)
    if (plain or (_has_shape(dst) and _has_shape(src))) and broadcast_error(dst.shape, src.shape):
        raise RuntimeError(
            f"{name}: {s} of shape {tuple(src.shape)} does not broadcast to {d} of shape "
            f"{tuple(dst.shape)}"
        )
    if not plain:
        _check_inplace(f"{name}: {d}", dst, dst.requires_grad or src.requires_grad)
        return  # torch judges the rest itself
    if dst.numel() and has_zero_stride(dst):
        raise RuntimeError(
            f"{name}: unsupported operation: more than one element of {d} refers to a single "
            f"memory location (shape {tuple(dst.shape)}, stride {dst.stride()}). Please clone() "
            "the tensor before performing the operation."
        )
    for arg, tensor in ((d, dst), (s, src)):
        if tensor.numel() and tensor.data_ptr() == 0:
            raise RuntimeError(
                f"{name}: {arg} has a shape but no memory (its storage was resized to 0, as FSDP does): "
                "gather it first"
            )
    if _overlap_partially(dst, src):
        raise RuntimeError(
            f"{name}: unsupported operation: some elements of {s} and {d} refer to a single "
            "memory location. Please clone() the tensor before performing the operation."
        )
    error = conversion_error(dst.dtype, src.dtype)
    if error is not None:
        raise type(error)(f"{name}: cannot copy {src.dtype} into {d} of {dst.dtype}: {error}")
    _check_inplace(
        f"{name}: {d}", dst, dst.requires_grad or src.requires_grad or dst._base is not None
    )


def check_fill(op: str, index: int | None, dst: Any, value: Any) -> None:
    """Raise what ``dst.fill_(value)`` would raise, as far as it can be known beforehand."""
    name, d, _ = _describe(op, index)
    v = "value" if index is None else f"values[{index}]"
    if not isinstance(dst, Tensor):
        raise TypeError(f"{name}: expected a Tensor as {d}, got {type(dst).__name__}")
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise RuntimeError(
                f"{name}: fill_ only supports 0-dimension value tensor but got {v} with "
                f"{value.dim()} dimensions"
            )
        if value.device.type == "meta" and dst.device.type != "meta":
            raise NotImplementedError(f"{name}: {v} is on the meta device; no data to fill with")
    elif not isinstance(value, (int, float, complex)) and not hasattr(value, "__float__"):
        raise TypeError(
            f"{name}: expected a number or a 0-dim tensor as {v}, got {type(value).__name__}"
        )
    if not is_plain(dst):
        if not isinstance(value, Tensor) and not dst.is_quantized:
            element_of(value, dst)
        _check_inplace(f"{name}: {d}", dst, dst.requires_grad)
        return
    if not isinstance(value, Tensor):
        element_of(value, dst)
    else:
        error = conversion_error(dst.dtype, value.dtype)
        if error is not None:
            raise type(error)(
                f"{name}: cannot fill {d} of {dst.dtype} from {v} of {value.dtype}: {error}"
            )
    _check_inplace(f"{name}: {d}", dst, dst.requires_grad or dst._base is not None)


def element_of(value: Any, dst: Tensor) -> Tensor:
    """``value`` as a tensor of shape () and ``dst``'s dtype, or what ``dst.fill_(value)`` raises.

    torch converts numbers for one element by another way than for many: the limits differ for float8
    and complex32, so as many elements as tell the difference are filled.
    """
    few = torch.empty(min(dst.numel(), 2) if _has_shape(dst) else 2, dtype=dst.dtype).fill_(value)
    return few[0] if few.numel() else torch.empty((), dtype=dst.dtype)


def tensor_list(op: str, what: str, values: Any) -> Sequence[Any]:
    """``values`` as a list or tuple of tensors, or the TypeError that names it."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{op}: expected a list or tuple of tensors as {what}, got {type(values).__name__}"
        )
    return values


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


def load_state_dict(model: torch.nn.Module, state_dict: Any) -> bool:
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
        new = [tensors.get(name) for name in names]
        if any(
            not isinstance(t, Tensor)
            or _layout(t) != _layout(old)
            or (t.layout is torch.strided and t.numel() and t.data_ptr() == 0)
            for t, old in zip(new, self._srcs)
        ):
            return True
        if _may_share_memory(self._dsts, new):
            return True
        self._srcs = new
        self._seen_srcs = [_fingerprint(t) for t in new]
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

    def run(self, progress: Callable[[int, int], object] | None = None) -> bool:
        """Write. False, and nothing written, if `replaced` or `moved` has something to say."""
        if self.replaced() or any(self.moved()):
            return False
        n = len(self._writes)
        follow = self._follow_autograd and torch.is_grad_enabled()
        if follow:
            pairs = [self._views(i, detach=False) for i in range(n)]
            for i, (dst, src) in enumerate(pairs):
                check_copy("apply", i, dst, src)
        else:
            for i, dst in enumerate(self._dsts):
                _check_inplace(f"apply: dsts[{i}]", dst, False)
            pairs = [self._views(i, detach=True) for i in range(n)]
        total = sum(d.nbytes for d, _ in pairs)
        done = reported = 0
        for dst, src in pairs:
            dst.copy_(src)
            done += dst.nbytes
            if progress is not None and (done - reported >= 32 << 20 or done == total):
                reported = done
                progress(done, total)
        _count(n)
        return True

    def verify(self) -> list[int]:
        """Indices of the writes whose destination does not hold what the source says."""
        differ = []
        for i in range(len(self._writes)):
            dst, src = self._views(i, detach=True)
            if not same_bits(dst, src):
                differ.append(i)
        return differ


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
            tensors[i]._use_count(),
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
    return (_counts([torch.empty(2)])[0], _counts([torch.empty(2)[:1]])[0])


def _layout(t: Tensor) -> tuple[Any, ...]:
    strides = t.stride() if t.layout is torch.strided else None
    return (t.dtype, t.device, tuple(t.shape), strides, t.is_conj(), t.is_neg())


def _fingerprint(t: Tensor) -> tuple[Any, ...]:
    return (t.data_ptr() if t.layout is torch.strided else id(t), *_layout(t))


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
            for d, s in zip(dst.split(step, axis), src.split(step, axis))
        )
    want = torch.empty(dst.shape, dtype=dst.dtype, device=dst.device)
    want.copy_(src)
    got = dst.contiguous()
    width = got.element_size()
    if got.numel() == 0:
        return True
    if got.dim() == 0:
        got, want = got.reshape(1), want.reshape(1)
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
