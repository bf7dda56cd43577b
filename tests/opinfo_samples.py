"""torch's own samples: the inputs that its test suite calls every operator with.

They come with torch (``torch.testing._internal``), which needs the package `expecttest`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .cases import random_bits
from .conftest import must_have_extension

__all__ = [
    "QUANTIZED",
    "Sample",
    "error_samples",
    "foreach_operators",
    "operators",
    "samples",
    "tensors_of",
]

QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)

Sample = tuple[Any, ...]
"""``(input, args, kwargs)`` of one call of an operator."""


@cache
def _invocations() -> Any:
    """torch's database of operators; importing it takes seconds, so not before it is needed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.testing._internal import common_methods_invocations
    except ModuleNotFoundError as error:
        if must_have_extension():
            pytest.fail(f"torch's samples must be there: {error}", pytrace=False)
        pytest.skip(f"torch's samples cannot be imported: {error}")
    # The import forbids every later `torch.backends.cudnn.enabled = ...` of the process.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return common_methods_invocations


@cache
def operators() -> dict[str, Any]:
    """Every OpInfo of torch by its full name: ``"as_strided.partial_views"``."""
    return {one.full_name: one for one in _invocations().op_db}


@cache
def foreach_operators() -> dict[str, Any]:
    """The OpInfos of the foreach family: ``"_foreach_copy"``."""
    module = _invocations()
    databases = [
        name for name in dir(module) if name.startswith("foreach_") and name.endswith("_op_db")
    ]
    return {one.name: one for name in databases for one in getattr(module, name)}


def samples(
    operator: Any, dtype: torch.dtype, *, requires_grad: bool = False, reference: bool = False
) -> Iterator[Sample]:
    """The samples of an operator, the same at every call.

    For a dtype that the operator does not do, those of float32 with the same layouts and random bits.
    """
    own = dtype in operator.dtypes
    draw = operator.sample_inputs_func
    if reference and operator.reference_inputs_func is not None:
        draw = operator.reference_inputs_func
    seed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # OpInfo.sample_inputs seeds again for every sample and looks at the stack: 10 ms each.
        drawn = draw(operator, "cpu", dtype if own else torch.float32, requires_grad)
        for number, sample in enumerate(drawn):
            one = (sample.input, sample.args, sample.kwargs)
            yield one if own else retyped(one, dtype, number)


def seed() -> None:
    """All three generators that samples are drawn from; torch.manual_seed also looks for devices."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def sparse_samples(operator: Any, layout: torch.layout) -> Iterator[Sample]:
    """Samples of the operator in a sparse layout, float64."""
    kind = str(layout).removeprefix("torch.sparse_")
    draw = getattr(operator, f"sample_inputs_sparse_{kind}_func")
    seed()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in draw(operator, "cpu", torch.float64, False):
                yield sample.input, sample.args, sample.kwargs
    except NotImplementedError:  # the operator has none, whatever it says it supports
        return


def error_samples(operator: Any) -> Iterator[tuple[Sample, type[Exception]]]:
    """What the operator must refuse, and the type of what it raises."""
    if operator.error_inputs_func is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for error in operator.error_inputs_func(operator, "cpu"):
            one = error.sample_input
            yield (one.input, one.args, one.kwargs), error.error_type


def tensors_of(sample: Any) -> list[Tensor]:
    """The tensors of a sample, each once."""
    found = [leaf for leaf in pytree.tree_leaves(sample) if isinstance(leaf, Tensor)]
    return list({id(tensor): tensor for tensor in found}.values())


def retyped(sample: Sample, dtype: torch.dtype, seed: int) -> Sample:
    """The sample with float32 tensors replaced by ones of `dtype`: the same layout, other bytes."""
    storages: dict[int, Tensor] = {}

    def retype(leaf: Any) -> Any:
        if leaf is torch.float32:
            return dtype
        if not isinstance(leaf, Tensor) or leaf.dtype is not torch.float32:
            return leaf
        if leaf.layout is not torch.strided:  # as an argument, beside a strided input
            return leaf
        if dtype in QUANTIZED:
            return torch.quantize_per_tensor(leaf.detach(), 0.125, 3, dtype)
        storage = leaf.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = random_bits((storage.nbytes() // 4,), dtype, seed)
        raw = storages[storage._cdata].untyped_storage()
        empty = torch.empty(0, dtype=dtype)
        return empty.set_(raw, leaf.storage_offset(), leaf.shape, leaf.stride())

    return pytree.tree_map(retype, sample)
