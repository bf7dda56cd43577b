"""What torch's samples become here: writes into their tensors and into views of them.

Each function takes a sample (``(input, args, kwargs)``) and yields calls. It is run on two twins of the
sample, so it draws nothing at random that a seed does not fix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import random_bits, values
from .guards import storage_bytes
from .opinfo_samples import Sample, tensors_of
from .parity import Call
from .twins import Twins, is_strided

__all__ = [
    "COPIES",
    "FILLS",
    "SCATTERS",
    "Build",
    "apart",
    "assignments",
    "copies",
    "joins",
    "lists",
    "pairs",
    "views",
]

Build = Callable[[Any, Sample, Twins], Iterator[Call]]

NUMBERS: tuple[Any, ...] = (0, 1, True, -3, 2.5, 300, float("nan"), float("inf"), 1 + 2j, 2**40)

OTHERS = (
    torch.bfloat16,
    torch.int64,
    torch.float8_e4m3fn,
    torch.int32,
    torch.complex64,
    torch.bool,
)
"""What tensors are converted to, and from."""

COPIES = (
    "alias_copy", "bfloat16", "bool", "byte", "cdouble", "cfloat", "chalf", "char", "clone",
    "contiguous", "double", "expand", "expand_as", "expand_copy", "float", "half", "int", "long",
    "permute_copy", "short", "squeeze_copy", "t_copy", "to", "transpose_copy", "unfold_copy",
    "unsqueeze_copy", "view_copy", "narrow_copy", "diagonal_copy",
)  # fmt: skip
"""Operators whose result is a copy of a view of their input, perhaps in another dtype."""

FILLS = (
    "fill",
    "full_like",
    "new_full",
    "new_ones",
    "new_zeros",
    "ones_like",
    "zero_",
    "zeros_like",
)
"""Operators whose result holds one number."""

SCATTERS = ("as_strided_scatter", "diagonal_scatter", "select_scatter", "slice_scatter")
"""Operators that write their second argument into a view of a copy of the first."""


def _like(tensor: Tensor, twins: Twins) -> Tensor:
    """Memory of its own, between pattern bytes, laid out as torch lays out a result."""
    like = torch.empty_like(tensor.detach())
    if is_strided(like) and like.numel():
        storage_bytes(like).fill_(1)
    return twins.of(like)


def _result(operator: Any, sample: Sample) -> Any:
    """What the operator gives, or None where it does not do the sample's dtype, or not here."""
    source, args, kwargs = sample
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return operator.op(source, *args, **kwargs)
    except Exception:  # not for this dtype, this processor, this build: what is tested is ours
        return None


def copies(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
    """``copy_`` into memory laid out like the result of the operator; its bits are what must come out."""
    source, args, kwargs = sample
    want = _result(operator, sample)
    if want is None:
        return
    view = source
    name = operator.name.removesuffix("_copy")
    if name == "as_strided" or not hasattr(source, name):
        return
    if operator.name.endswith("_copy") and name != "alias":
        view = getattr(source, name)(*args, **kwargs)
    yield Call("copy_", _like(want, twins), view, want.detach().clone())


def fills(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
    """``fill_`` of the input with the operator's number; the result says what comes out."""
    tensor = sample[0]
    want = _result(operator, sample)
    if want is None or want.numel() == 0:
        return
    number = want.reshape(-1)[0].item()
    yield Call("fill_", _like(want, twins), number, want.detach().clone())
    yield Call("fill_", tensor, number)


_VIEW_OF: dict[str, Callable[..., Tensor]] = {
    "as_strided_scatter": lambda t, _, *a, **k: t.as_strided(*a, **k),
    "diagonal_scatter": lambda t, _, *a, **k: t.diagonal(*a, **k),
    "select_scatter": lambda t, _, *a, **k: t.select(*a, **k),
    "slice_scatter": lambda t, _, *a, **k: torch.ops.aten.slice(t, *a, **k),
}


def scatters(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
    """``copy_`` into the view that the operator writes to."""
    tensor, (source, *args), kwargs = sample
    view = _VIEW_OF[operator.name]
    # Of memory that no leaf owns, so that autograd can record it; then of the sample's own.
    copy = twins.of(tensor.detach().clone())
    yield Call("copy_", view(copy, source, *args, **kwargs), source)
    yield Call("copy_", view(tensor, source, *args, **kwargs), source)


def joins(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
    """``cat`` and ``stack``: a list of copies into neighbouring slices of one tensor."""
    tensors, args, kwargs = sample
    whole = _result(operator, sample)
    if whole is None:
        return
    dim = kwargs.get("dim", args[0] if args else 0)
    into = _like(whole, twins)
    if operator.name == "stack":
        slices = list(into.unbind(dim))
        yield Call("foreach_copy_", slices, list(tensors))
    elif all(t.dim() == whole.dim() for t in tensors):
        slices = list(into.split([t.shape[dim] for t in tensors], dim))
        yield Call("foreach_copy_", slices, list(tensors))


_INDEX_OF: dict[str, Callable[..., Any]] = {
    "__getitem__": lambda index: index,
    "select_scatter": lambda _, dim, index: (*[slice(None)] * dim, index),
    "slice_scatter": lambda _, dim=0, first=None, last=None, step=1: (
        *[slice(None)] * dim,
        slice(first, last, step),
    ),
}


def assignments(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
    """``tensor[index] = value``, for a number, a tensor, one that broadcasts and one that does not."""
    tensor, args, kwargs = sample
    index = _INDEX_OF[operator.name](*args, **kwargs)
    part = tensor.detach()[index]
    yield Call("assign", (tensor, index), 1.5 if tensor.is_floating_point() else 1)
    yield Call("assign", (tensor, index), random_bits(part.shape, tensor.dtype, 7))
    yield Call("assign", (tensor, index), values(part.shape[-1:], torch.float32, 8))
    yield Call("assign", (tensor, index), values((*part.shape, 3), tensor.dtype))


def _dense(like: Tensor, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of the same shape; of the same dtype with random bits."""
    if dtype is not None and dtype is not like.dtype:
        return values(like.shape, dtype, seed)
    if not is_strided(like):
        return like.detach().clone()
    return random_bits(like.shape, like.dtype, seed)


def _around(tensor: Tensor, twins: Twins, seed: int, other: torch.dtype) -> Iterator[Call]:
    """Into a tensor, out of it, with a conversion, and filled."""
    yield Call("copy_", tensor, _dense(tensor, seed))
    yield Call("copy_", twins.of(_dense(tensor, seed + 1)), tensor)
    yield Call("copy_", twins.of(_dense(tensor, seed + 2, other)), tensor)
    yield Call("copy_", tensor, _dense(tensor, seed + 3, other))
    yield Call("fill_", tensor, NUMBERS[seed % len(NUMBERS)])


def views(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
    """Every output of the operator that lies in memory of the sample, as destination and as source."""
    mine = {t.untyped_storage()._cdata for t in tensors_of(sample) if is_strided(t)}
    outputs = [t for t in tensors_of(_result(operator, sample)) if is_strided(t)]
    for seed, view in enumerate(t for t in outputs if t.untyped_storage()._cdata in mine):
        yield from _around(view, twins, seed + math.prod(view.shape) % 7, torch.float16)


def pairs(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
    """The sample's own tensors into each other and out of each other, and as lists."""
    tensors = tensors_of(sample)
    for seed, tensor in enumerate(tensors[:3]):
        yield from _around(tensor, twins, seed, OTHERS[(seed + tensor.numel()) % len(OTHERS)])
        yield Call("copy_", tensor, tensor)
    if len(tensors) < 2:
        return
    for dst, src in zip(tensors, tensors[1:] + tensors[:1]):
        yield Call("copy_", dst, src)
    yield Call("fill_", tensors[0], tensors[-1])
    yield Call("foreach_copy_", tensors, tensors[::-1])


def lists(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
    """The lists of a foreach operator: copied, zeroed, and filled with its scalars."""
    dsts, args, _ = sample
    for value in args:
        tensors = [t for t in value if isinstance(t, Tensor)] if isinstance(value, list) else []
        if tensors and len(tensors) == len(dsts):
            yield Call("foreach_copy_", dsts, tensors)
        else:
            yield Call("foreach_fill_", dsts, value)
    yield Call("foreach_copy_", dsts, dsts[::-1])
    yield Call("foreach_copy_", [t.mT if t.dim() > 1 else t for t in dsts], dsts)
    yield Call("foreach_zero_", dsts, None)


def apart(build: Build) -> Build:
    """Only those calls of `build` that copy from one memory to another, as between host and device."""

    def storages(tree: Any) -> set[int]:
        return {t.untyped_storage()._cdata for t in tensors_of(tree) if is_strided(t)}

    def calls(operator: Any, sample: Sample, twins: Twins) -> Iterator[Call]:
        for call in build(operator, sample, twins):
            if storages(call.dst).isdisjoint(storages(call.value)):
                yield call

    return calls
