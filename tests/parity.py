"""One write done by torch and by us on twins of the same tensors: everything that can be seen is compared."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import paramkit

from .guards import assert_same_bits
from .known_differences import DIFFERENCES, VERSIONS
from .twins import Twins, is_strided

__all__ = ["OURS", "PATCHED", "TORCH", "Call", "Seen", "Tally", "compare"]


@dataclass
class Call:
    """One write: what kind, its destination or destinations, and what is written."""

    kind: str
    dst: Any
    value: Any
    want: Tensor | None = None
    """What `dst` is afterwards, if torch has another operator that says so."""


def _assign(dst: tuple[Tensor, Any], value: Any) -> Tensor:
    tensor, index = dst
    tensor[index] = value
    return tensor


def _record(dst: tuple[Tensor, Any], value: Any) -> Tensor:
    tensor, index = dst
    with paramkit.writes({"tensor": tensor}) as w:
        w["tensor"][index] = value
    return tensor


def _fill_each(dsts: list[Tensor], values: Any) -> None:
    values = values if isinstance(values, (list, tuple)) else [values] * len(dsts)
    if not dsts or len(dsts) != len(values):
        raise RuntimeError("as torch's foreach functions")
    for dst, value in zip(dsts, values):
        dst.fill_(value)


def _patched(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def patched(dst: Any, value: Any) -> Any:
        with paramkit.patch_torch():
            return call(dst, value)

    return patched


Side = dict[str, Callable[[Any, Any], Any]]

TORCH: Side = {
    "copy_": lambda dst, src: dst.copy_(src),
    "fill_": lambda dst, value: dst.fill_(value),
    "foreach_copy_": torch._foreach_copy_,
    "foreach_fill_": _fill_each,
    "foreach_zero_": lambda dsts, _: torch._foreach_zero_(dsts),
    "assign": _assign,
}
LOOP: Side = {
    "foreach_copy_": lambda dsts, srcs: [dst.copy_(src) for dst, src in zip(dsts, srcs)],
    "foreach_zero_": lambda dsts, _: [dst.zero_() for dst in dsts],
}
"""What a list stands for, where torch refuses the list."""
OURS: Side = {
    "copy_": paramkit.copy_,
    "fill_": paramkit.fill_,
    "foreach_copy_": paramkit.foreach_copy_,
    "foreach_fill_": paramkit.foreach_fill_,
    "foreach_zero_": lambda dsts, _: paramkit.foreach_fill_(dsts, 0),
    "assign": _record,
}

PATCHED: Side = {kind: _patched(call) for kind, call in TORCH.items()}
"""torch's own calls while torch is patched."""


@dataclass
class Seen:
    """What a call was seen to do."""

    error: Exception | None
    result: Any
    tensors: list[Tensor]
    rises: list[int]

    @classmethod
    def of(cls, side: Side, call: Call) -> Seen:
        tensors = [leaf for leaf in pytree.tree_leaves(call.dst) if isinstance(leaf, Tensor)]
        before = [_version(tensor) for tensor in tensors]
        error, result = None, None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = side[call.kind](call.dst, call.value)
        except Exception as raised:  # its type is compared
            error = raised
        rises = [_version(tensor) - was for tensor, was in zip(tensors, before, strict=True)]
        return cls(error, result, tensors, rises)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass
class Tally:
    """How many calls agreed, how many errors among them, and how often each known difference showed.

    `recorded` counts writes that autograd recorded; `kernels` says whether any call is for the kernels.
    """

    kernels: bool = True
    calls: int = 0
    errors: int = 0
    recorded: int = 0
    differences: Counter[str] = field(default_factory=Counter)


def compare(
    side: Side,
    torchs: tuple[Twins, Iterable[Call]],
    ours: tuple[Twins, Iterable[Call]],
    tally: Tally,
    what: str,
) -> None:
    """Do the calls one after the other on both twins, and compare after each."""
    for number, (theirs, mine) in enumerate(zip(torchs[1], ours[1], strict=True)):
        label = f"{what}, call {number}: {mine.kind} {_shape(mine.dst)} <- {_shape(mine.value)}"
        start = [memory.clone() for memory in ours[0].memory()]
        reference, got = Seen.of(TORCH, theirs), Seen.of(side, mine)
        tally.calls += 1
        listed = [one for one in DIFFERENCES if side is not PATCHED or one.patched]
        known = [one.name for one in listed if one.matches(mine, reference, got)]
        tally.differences.update(known)
        if type(reference.error) is not type(got.error):
            assert known, f"{label}: torch {reference.error!r}, here {got.error!r}"
        if reference.error is not None and got.error is None:
            tally.errors += 1
            reference = Seen.of(LOOP, theirs)
        if got.error is not None and side is OURS:
            for memory, was in zip(ours[0].memory(), start, strict=True):
                assert torch.equal(memory, was), f"{label}: raised, and yet wrote"
        if reference.error is not None or got.error is not None:
            tally.errors += reference.error is not None
            if known and any(reference.rises):  # torch has written, and we have not
                if not _alike_again(torchs[0], ours[0]):
                    return
                continue
            _same_memory(torchs[0], ours[0], label)
            continue
        assert got.rises == reference.rises or VERSIONS in known, (
            f"{label}: versions {got.rises}, {reference.rises}"
        )
        _same_tensors(reference, got, label)
        _same_memory(torchs[0], ours[0], label)
        if mine.want is not None:
            wanted = Seen(None, None, [mine.want], got.rises)
            for one in listed:  # what may differ from torch's call may differ from its operator
                one.matches(mine, wanted, got)
            assert_same_bits(got.tensors[0], mine.want, what=label)
        tally.recorded += _same_gradients(reference, got, torchs[0], ours[0], label)


def _alike_again(theirs: Twins, mine: Twins) -> bool:
    """Give torch's twins our bytes, so that further calls can be compared; False if they have other state."""
    for twins in (theirs, mine):
        if not all(is_strided(twin) and not twin.requires_grad for twin in twins.tensors):
            return False
    for a, b in zip(theirs.memory(), mine.memory(), strict=True):
        a.copy_(b)
    return True


def _same_tensors(reference: Seen, got: Seen, label: str) -> None:
    """Results, strides and what autograd knows."""
    if isinstance(reference.result, Tensor):
        assert got.result is got.tensors[0], f"{label}: another result"
    for theirs, mine in zip(reference.tensors, got.tensors, strict=True):
        assert mine.shape == theirs.shape, label
        assert mine.dtype is theirs.dtype, label
        assert mine.layout is theirs.layout, label
        if is_strided(mine):
            assert mine.stride() == theirs.stride(), label
            assert mine.storage_offset() == theirs.storage_offset(), label
        elif mine.device.type != "meta":
            assert_same_bits(_dense(mine), _dense(theirs), what=label)
        for a, b in ((mine, theirs), (mine._base, theirs._base)):
            if a is None or b is None:
                continue
            assert a.requires_grad == b.requires_grad, label
            assert type(a.grad_fn).__name__ == type(b.grad_fn).__name__, label


def _same_gradients(reference: Seen, got: Seen, theirs: Twins, mine: Twins, label: str) -> bool:
    """What flows back through the destinations, if autograd recorded the write."""
    gradients: list[Any] = []
    for seen, twins in ((reference, theirs), (got, mine)):
        leaves = [t for t in twins.tensors if t.requires_grad and t.is_leaf]
        recorded = [t for t in seen.tensors if t.grad_fn is not None]
        if not leaves or not recorded:
            return False
        ones = [torch.ones_like(t) for t in recorded]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                gradients.append(
                    torch.autograd.grad(
                        recorded, leaves, ones, allow_unused=True, retain_graph=True
                    )
                )
            except RuntimeError as error:  # as_strided of a leaf with shared elements has none
                gradients.append([type(error)])
    if not all(isinstance(one, tuple) for one in gradients):
        assert gradients[0] == gradients[1], label
        return False
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None), label
        if a is not None:
            assert_same_bits(b, a, what=f"{label}, gradient")
    return True


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor.int_repr() if tensor.is_quantized else tensor
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _same_memory(theirs: Twins, mine: Twins, label: str) -> None:
    for a, b in zip(mine.memory(), theirs.memory(), strict=True):
        if torch.equal(a, b):
            continue
        wrong = (a != b).nonzero().flatten()
        pytest.fail(f"{label}: {len(wrong)} bytes differ, first at {int(wrong[0])} of {len(a)}")


def _shape(tree: Any) -> str:
    def leaf(one: Any) -> str:
        if isinstance(one, Tensor):
            strides = (
                one.stride() if one.layout is torch.strided and not one.is_nested else one.layout
            )
            return f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}/{strides}"
        return repr(one)[:40]

    leaves = [leaf(one) for one in pytree.tree_leaves(tree)]
    return ", ".join(leaves[:4]) + (f" and {len(leaves) - 4} more" if len(leaves) > 4 else "")
