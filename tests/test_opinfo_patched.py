"""torch's own samples with `patch_torch`: every operator gives what it gives without.

Operators call `copy_` and `fill_` inside themselves, so this runs all of torch's database: results,
strides, autograd and errors. Writes of every size take the kernels here, which is asserted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import paramkit
from tests import opinfo_calls
from tests.cases import DTYPES
from tests.conftest import every_size
from tests.guards import assert_same_bits, bits
from tests.opinfo_samples import (
    Sample,
    error_samples,
    foreach_operators,
    operators,
    samples,
    seed,
)
from tests.parity import PATCHED, Tally
from tests.test_opinfo import KINDS, SHARDS, compiled_only, named, rotated, run, shard, tally
from tests.twins import Twins, is_strided

__all__ = ["tally"]

# Their result is memory that nobody has written.
UNINITIALIZED = (
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _every_size(backend: str) -> Iterator[None]:
    """Most samples are smaller than the writes that the patch takes from torch."""
    with every_size():
        yield


@compiled_only
@pytest.mark.parametrize("kind", KINDS)
def test_writes(kind: str, tally: Tally) -> None:
    build, names = KINDS[kind]
    for number, operator in enumerate(named(names)):
        for dtype in dict.fromkeys((torch.complex128, *rotated(number, 1))):
            run(build, operator, samples(operator, dtype), tally, side=PATCHED, most=8)


@compiled_only
def test_foreach(tally: Tally) -> None:
    for number, name in enumerate(("_foreach_copy", "_foreach_zero")):
        operator = foreach_operators()[name]
        for dtype in dict.fromkeys(rotated(number, 7)):
            drawn = samples(operator, dtype)
            run(opinfo_calls.lists, operator, drawn, tally, side=PATCHED)


def result(call: Any, sample: Sample, patch: bool) -> tuple[Any, type[Exception] | None, Twins]:
    """What an operator gives for a twin of the sample, and leaves in it."""
    twins = Twins()
    source, args, kwargs = twins.of(sample)
    context: AbstractContextManager[Any] = paramkit.patch_torch() if patch else nullcontext()
    seed()
    try:
        with warnings.catch_warnings(), context:
            warnings.simplefilter("ignore")
            return call(source, *args, **kwargs), None, twins
    except Exception as error:  # its type is compared
        return None, type(error), twins


def same_bits(got: Tensor, expected: Tensor) -> bool:
    try:
        assert_same_bits(got, expected, any_nan=True)
    except AssertionError:
        return False
    return True


def steady(call: Any, sample: Sample) -> bool:
    """Whether torch alone gives the same bits each time: LAPACK's depend on where memory happens to lie."""
    first, kept = None, []
    for number in range(300):
        kept.append(torch.empty(1 + number % 41))
        got, _, twins = result(call, sample, False)
        leaves = (*pytree.tree_leaves(got), *twins.tensors)
        seen = [t.detach() for t in leaves if isinstance(t, Tensor) and is_strided(t)]
        if first is not None and not all(map(same_bits, seen, first)):
            return False
        first = first or seen
    return True


def same_values(got: Tensor, expected: Tensor, call: Any, sample: Sample, what: str) -> None:
    """The same bits, but for the byte of a bool, a listed difference, and where torch has no bits to match."""
    assert got.dtype is expected.dtype, what
    assert got.shape == expected.shape, what
    if expected.dtype is torch.bool:  # as_strided may find a byte of the margin
        odd = (bits(got) > 1) & (bits(expected) == 1)
        assert bool(((bits(got) == bits(expected)) | odd).all()), what
    elif same_bits(got, expected) or steady(call, sample):
        assert_same_bits(got, expected, any_nan=True, what=what)
    else:
        torch.testing.assert_close(got, expected, equal_nan=True)


def same(call: Any, sample: Sample, tally: Tally, what: str) -> None:
    """An operator with and without the patch."""
    expected, error, theirs = result(call, sample, False)
    got, our_error, mine = result(call, sample, True)
    tally.calls += 1
    assert our_error is error, f"{what}: torch {error}, patched {our_error}"
    tally.errors += error is not None
    pairs = list(zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True))
    pairs += list(zip(mine.tensors, theirs.tensors, strict=True))
    # What was resized before an error is memory that nobody has written.
    unwritten = {
        id(b)
        for b, original in zip(theirs.tensors, theirs.originals, strict=True)
        if error is not None and b.shape != original.shape
    }
    for a, b in pairs:
        if not isinstance(b, Tensor):
            assert a == b or (a != a and b != b) or isinstance(b, torch.Generator), what
            continue
        assert type(a) is type(b), what
        assert a.requires_grad == b.requires_grad, what
        assert type(a.grad_fn).__name__ == type(b.grad_fn).__name__, what
        if is_strided(a) and is_strided(b):
            assert a.shape == b.shape, what
            assert a.stride() == b.stride(), what
            assert a._version == b._version, what
            if id(b) not in unwritten:
                same_values(a.detach(), b.detach(), call, sample, what)
    for a, b in zip(mine.margins(), theirs.margins(), strict=True):
        assert torch.equal(a, b), f"{what}: bytes outside of the tensors"


def operators_with(operator: Any, dtype: torch.dtype, tally: Tally, most: int) -> None:
    """Function and in-place variant of an operator, with every sample of a dtype."""
    # Some operators name integers among the dtypes that they differentiate.
    differentiable = dtype.is_floating_point or dtype.is_complex
    differentiable &= dtype in operator.backward_dtypes and operator.supports_autograd
    drawn: Iterator[Sample] = samples(operator, dtype, requires_grad=differentiable)
    for number, sample in enumerate(drawn):
        if number == most:
            return
        what = f"{operator.full_name}, {dtype}, sample {number}"
        same(operator.op, sample, tally, what)
        if operator.inplace_variant is not None and isinstance(sample[0], Tensor):
            same(operator.inplace_variant, sample, tally, f"{what}, in place")


@compiled_only
def test_operators(tally: Tally) -> None:
    for number, operator in enumerate(
        named(("cumsum", "roll", "tril", "index_put", "cat", "flip", "to"))
    ):
        for dtype in rotated(number, 1):
            if dtype in operator.dtypes:
                operators_with(operator, dtype, tally, 10)


@compiled_only
def test_errors(tally: Tally) -> None:
    tally.kernels = False
    for operator in list(operators().values())[::9]:
        for number, (sample, _) in enumerate(error_samples(operator)):
            same(operator.op, sample, tally, f"{operator.full_name}, error {number}")
    assert tally.errors > 50


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample(kind: str, tally: Tally) -> None:
    """The operators that are writes, with torch's longer lists of samples."""
    build, names = KINDS[kind]
    for operator in named(names):
        for dtype in DTYPES:
            run(build, operator, samples(operator, dtype, reference=True), tally, side=PATCHED)


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("number", range(SHARDS))
def test_every_operator(number: int, tally: Tally) -> None:
    for operator in shard(number, list(operators().values())):
        if operator.name in UNINITIALIZED:
            continue
        for dtype in DTYPES:
            if dtype in operator.dtypes:
                operators_with(operator, dtype, tally, 30)
        for k, (sample, _) in enumerate(error_samples(operator)):
            same(operator.op, sample, tally, f"{operator.full_name}, error {k}")
