"""What torch would say of a write, found out before the first one: the fallback's checks.

Plans use them too, on every backend, so that an error is the same wherever it is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "broadcast_error",
    "check_copy",
    "check_fill",
    "check_inplace",
    "conversion_error",
    "element_of",
    "has_no_memory",
    "has_zero_stride",
    "is_plain",
    "tensor_list",
]


@cache
def conversion_error(dst: torch.dtype, src: torch.dtype) -> Exception | None:
    """What torch raises when it copies ``src`` into ``dst`` (None when it can), found by trying one element."""
    import warnings

    to, of = torch.empty(1, dtype=dst), torch.empty(1, dtype=src)  # no memory for them is no answer
    try:
        with warnings.catch_warnings():  # complex -> real warns at the real copy, not at this probe
            warnings.simplefilter("ignore")
            to.copy_(of)
    except MemoryError:
        raise
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


def check_inplace(where: str, dst: Tensor, differentiable: bool) -> None:
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
    """torch's own rule (ATen/MemoryOverlap): only dense tensors of one storage are judged.

    Two storages at one address, as of two `torch.from_numpy`, are two.
    """
    if a is b or a.numel() == 0 or b.numel() == 0:
        return False
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    if not (_dense(a) and _dense(b)):
        return False
    a0, b0 = a.data_ptr(), b.data_ptr()
    a1, b1 = a0 + a.nbytes, b0 + b.nbytes
    if (a0, a1) == (b0, b1):
        return a.stride() != b.stride()
    return a0 < b1 and b0 < a1


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same elements in the same order, by torch's own rule."""
    return (
        a.dtype == b.dtype
        and (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    )


def _dense(t: Tensor) -> bool:
    """As torch's is_non_overlapping_and_dense: a permutation of a contiguous tensor."""
    expected = 1
    for stride, size in sorted((st, n) for n, st in zip(t.shape, t.stride()) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _has_shape(t: Tensor) -> bool:
    """Whether the shape of a tensor, or of one in parts, is what it says, and may be asked for."""
    return not isinstance(t, torch.Tensor) or not (
        t.is_nested
        or isinstance(t, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer))
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def has_no_memory(tensor: Tensor) -> bool:
    """Whether a strided tensor's storage was resized to 0, as FSDP does: a shape, but no memory."""
    # The address is the storage's, null, plus the offset.
    offset = tensor.storage_offset() * tensor.element_size()
    try:
        return tensor.numel() > 0 and tensor.data_ptr() == offset
    except RuntimeError:  # what vmap and grad wrap has no address
        return True


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
        check_inplace(f"{name}: {d}", dst, dst.requires_grad or src.requires_grad)
        return  # torch judges the rest itself
    repeats = dst.numel() > 0 and has_zero_stride(dst)
    needs = dst.requires_grad or src.requires_grad or dst._base is not None
    if dst is src or (repeats and _same_view(dst, src)):
        # Which torch looks for first: no value moves.
        check_inplace(f"{name}: {d}", dst, needs)
        return
    if repeats:
        raise RuntimeError(
            f"{name}: unsupported operation: more than one element of {d} refers to a single "
            f"memory location (shape {tuple(dst.shape)}, stride {dst.stride()}). Please clone() "
            "the tensor before performing the operation."
        )
    for arg, tensor in ((d, dst), (s, src)):
        if has_no_memory(tensor):
            raise RuntimeError(
                f"{name}: {arg} has a shape but no memory (its storage was resized to 0, as FSDP does): "
                "gather it first"
            )
    if _overlap_partially(dst, src):
        raise RuntimeError(
            f"{name}: unsupported operation: some elements of {s} and {d} refer to a single "
            "memory location. Please clone() the tensor before performing the operation."
        )
    error = conversion_error(dst.dtype, src.dtype) if dst.numel() else None
    if error is not None:
        raise type(error)(f"{name}: cannot copy {src.dtype} into {d} of {dst.dtype}: {error}")
    check_inplace(f"{name}: {d}", dst, needs)


def is_fillable(dst: Tensor, value: Any) -> bool:
    """Whether torch has a `fill_` for the layout: no sparse tensor is filled from a tensor, no COO tensor at all."""
    if dst.layout is torch.strided or type(dst) not in (Tensor, torch.nn.Parameter):
        return True
    return dst.layout is not torch.sparse_coo and not isinstance(value, Tensor)


def check_fill(op: str, index: int | None, dst: Any, value: Any) -> None:
    """Raise what ``dst.fill_(value)`` would raise, as far as it can be known beforehand."""
    name, d, _ = _describe(op, index)
    v = "value" if index is None else f"values[{index}]"
    if not isinstance(dst, Tensor):
        raise TypeError(f"{name}: expected a Tensor as {d}, got {type(dst).__name__}")
    if not is_fillable(dst, value):
        raise NotImplementedError(
            f"{name}: torch fills no {dst.layout} tensor from {type(value).__name__}, and {d} is one"
        )
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
            _check_number(name, v, d, value, dst)
        check_inplace(f"{name}: {d}", dst, dst.requires_grad)
        return
    if has_no_memory(dst):
        raise RuntimeError(
            f"{name}: {d} has a shape but no memory (its storage was resized, as FSDP does): gather it first"
        )
    if not isinstance(value, Tensor):
        _check_number(name, v, d, value, dst)
    else:
        # On one device torch's fill_ with a tensor is copy_, which refuses what is expanded.
        if dst.device == value.device and dst.numel() and has_zero_stride(dst):
            raise RuntimeError(
                f"{name}: unsupported operation: more than one element of {d} refers to a single memory "
                f"location (shape {tuple(dst.shape)}, stride {dst.stride()}). Please clone() the tensor "
                "before performing the operation."
            )
        error = conversion_error(dst.dtype, value.dtype)
        if error is not None:
            raise type(error)(
                f"{name}: cannot fill {d} of {dst.dtype} from {v} of {value.dtype}: {error}"
            )
    check_inplace(f"{name}: {d}", dst, dst.requires_grad or dst._base is not None)


def _check_number(name: str, v: str, d: str, value: Any, dst: Tensor) -> None:
    try:
        element_of(value, dst)
    except (RuntimeError, NotImplementedError, OverflowError) as error:
        raise type(error)(f"{name}: {v} into {d} of {dst.dtype}: {error}") from None


def element_of(value: Any, dst: Tensor) -> Tensor:
    """``value`` as a tensor of shape () and ``dst``'s dtype, or what ``dst.fill_(value)`` raises.

    torch converts numbers for one element by another way than for many: the limits differ for float8
    and complex32, so as many elements as tell the difference are filled (on a GPU there is none).
    """
    alone = dst.device.type == "cpu" and _has_shape(dst) and dst.numel() < 2
    few = torch.empty(dst.numel() if alone else 2, dtype=dst.dtype).fill_(value)
    return few[0] if few.numel() else torch.empty((), dtype=dst.dtype)


def tensor_list(op: str, what: str, values: Any) -> Sequence[Any]:
    """``values`` as a list or tuple of tensors, or the TypeError that names it."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{op}: expected a list or tuple of tensors as {what}, got {type(values).__name__}"
        )
    return values
