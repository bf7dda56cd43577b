"""Every dtype torch has: same-dtype copies keep every bit, casts and fills give torch's bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import paramkit
from tests import cases
from tests.guards import (
    Layout,
    assert_same_bits,
    assert_same_storage,
    nothing_written,
    outcome,
    place,
    watch,
)

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

EXOTIC = [
    name
    for name in (
        "uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7",
        "int1", "int2", "int3", "int4", "int5", "int6", "int7",
        "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2",
    )
    if hasattr(torch, name)
]  # fmt: skip
"""Dtypes without arithmetic: torch copies some of them and refuses others."""


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(cases.LAYOUTS))
def test_same_dtype_keeps_every_bit(name: str, dtype: torch.dtype) -> None:
    """Random bytes: NaN payloads, signalling NaNs, denormals, negative zeros."""
    dst, src = cases.LAYOUTS[name](dtype, cases.random_bits)
    paramkit.copy_(dst, src)
    assert_same_bits(dst, src, what=name)
    dst, src = cases.LAYOUTS[name](dtype, cases.random_bits)
    paramkit.foreach_copy_([dst], [src])
    assert_same_bits(dst, src, what=f"foreach, {name}")


def test_nan_payloads_survive() -> None:
    for bits_dtype, dtype, patterns in (
        (torch.int32, torch.float32, (0x7FC00001, 0x7F800001, -1, 0x7FBFFFFF)),
        (torch.int64, torch.float64, (0x7FF8000000000001, 0x7FF0000000000001, -1)),
        (torch.int16, torch.bfloat16, (0x7FC1, 0x7F81, -1)),
        (torch.int16, torch.float16, (0x7E01, 0x7C01, -1)),
    ):
        src = torch.tensor(patterns, dtype=bits_dtype).view(dtype)
        dst = torch.zeros(len(patterns), dtype=dtype)
        paramkit.copy_(dst, src)
        assert dst.view(bits_dtype).tolist() == list(patterns)


def interesting(src: torch.dtype, dst: torch.dtype) -> Tensor:
    """Values in the range of both dtypes: fractions, ties, signs, zeros, infinities and NaN."""
    numbers = [1.0, 2.0, 3.0, 1.5, 2.5, 0.5, 0.25, 7.0, 96.0, 100.0, 0.75, 1.0 + 2**-9, 0.1, 3.3]
    positive_only = {torch.float8_e8m0fnu}
    unsigned = {d for d in cases.INTEGERS if str(d).startswith("torch.uint")}
    if not {src, dst} & (positive_only | unsigned):
        numbers += [-1.0, -2.5, -0.5, -100.0, -0.1]
    if not {src, dst} & positive_only:
        numbers += [0.0]
    if src.is_floating_point and dst.is_floating_point and not {src, dst} & positive_only:
        numbers += [-0.0, 2.0**-6, 2.0**-9, 2.0**-14, 1e-3]
    if (src.is_floating_point or src.is_complex) and (dst.is_floating_point or dst.is_complex):
        numbers += [math.inf, math.nan]
        if not {src, dst} & positive_only:
            numbers += [-math.inf]
    # Enough of them to run through vector bodies and tails alike.
    numbers = (numbers * 8)[: 8 * len(numbers) - 3]
    wide = torch.tensor(numbers, dtype=torch.float64)
    if src.is_complex:
        wide = torch.complex(wide, wide.flip(0))
        if src == torch.complex32:
            wide = wide.to(torch.complex64)
    return wide.to(src)


@pytest.mark.parametrize("dst_dtype", cases.DTYPES, ids=str)
def test_casts_as_torch(dst_dtype: torch.dtype) -> None:
    """Every pair of dtypes: torch's bits (a NaN for a NaN), or torch's refusal."""
    for src_dtype in cases.DTYPES:
        if src_dtype == dst_dtype:
            continue
        what = f"{dst_dtype} <- {src_dtype}"
        source = interesting(src_dtype, dst_dtype)
        strided = source.repeat_interleave(2)[::2]
        for src in (source, strided):
            layout = Layout.dense(src.shape)
            expected, got = place(layout, dst_dtype), place(layout, dst_dtype)
            error = outcome(lambda e=expected, s=src: e.copy_(s))
            if error is None:
                paramkit.copy_(got, src)
                assert_same_bits(got, expected, any_nan=True, what=what)
            else:
                with nothing_written(got), pytest.raises(error):
                    paramkit.copy_(got, src)
                with nothing_written(got), pytest.raises(error):
                    paramkit.foreach_copy_([got], [src])


@pytest.mark.parametrize("src_dtype", cases.FLOAT8, ids=str)
def test_every_float8_widens_as_torch(src_dtype: torch.dtype) -> None:
    source = torch.arange(256).to(torch.uint8).view(src_dtype)
    for dst_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        expected, got = torch.zeros(256, dtype=dst_dtype), torch.zeros(256, dtype=dst_dtype)
        expected.copy_(source)
        paramkit.copy_(got, source)
        assert_same_bits(got, expected, any_nan=True, what=f"{dst_dtype} <- {src_dtype}")


@pytest.mark.parametrize("src_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_casts_as_torch(src_dtype: torch.dtype) -> None:
    source = torch.arange(-(2**15), 2**15).to(torch.int16).view(src_dtype)
    for dst_dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        if dst_dtype == src_dtype:
            continue
        expected, got = torch.zeros(2**16, dtype=dst_dtype), torch.zeros(2**16, dtype=dst_dtype)
        expected.copy_(source)
        paramkit.copy_(got, source)
        assert_same_bits(got, expected, any_nan=True, what=f"{dst_dtype} <- {src_dtype}")


def test_casts_in_mixed_lists() -> None:
    dsts, srcs = [], []
    for dst_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32):
        for src_dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8):
            dsts.append(torch.zeros(3, 50, dtype=dst_dtype)[:, 1:34])
            srcs.append(cases.values((3, 33), src_dtype))
    twins = [dst.clone() for dst in dsts]
    for twin, src in zip(twins, srcs, strict=True):
        twin.copy_(src)
    paramkit.foreach_copy_(dsts, srcs)
    for dst, twin in zip(dsts, twins, strict=True):
        assert_same_bits(dst, twin, any_nan=True)


@pytest.mark.parametrize("name", EXOTIC)
def test_exotic_dtypes_as_torch(name: str) -> None:
    """torch's result, or what torch raises, for dtypes that it knows by name only."""
    dtype = getattr(torch, name)

    def make() -> tuple[Tensor, Tensor]:
        return place(Layout.dense((6,)), dtype), place(Layout.dense((6,)), dtype, seed=5)

    (expected, src), (got, _) = make(), make()
    floats = torch.ones(6)
    for theirs, ours in (
        (lambda: expected.copy_(src), lambda: paramkit.copy_(got, src)),
        (lambda: expected.copy_(floats), lambda: paramkit.copy_(got, floats)),
        (lambda: expected.fill_(1), lambda: paramkit.fill_(got, 1)),
        (lambda: expected.copy_(src), lambda: paramkit.foreach_copy_([got], [src])),
        (lambda: expected[::2].copy_(src[:3]), lambda: paramkit.copy_(got[::2], src[:3])),
        (lambda: expected.fill_(1), lambda: paramkit.foreach_fill_([got], 1)),
        (lambda: floats.copy_(src), lambda: paramkit.copy_(floats, src)),
    ):
        error = outcome(theirs)
        if error is None:
            ours()
        else:
            with nothing_written(got), pytest.raises(error):
                ours()
        assert_same_storage(got, expected, name)


def test_quantized_as_torch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = torch.quantize_per_tensor
        source = make(torch.tensor([0.0, 0.5, 1.0, 2.0]), 0.5, 0, torch.quint8)
        for dst_of, src in (
            (lambda: make(torch.zeros(4), 0.5, 0, torch.quint8), source),
            (
                lambda: make(torch.zeros(4), 0.5, 0, torch.quint8),
                torch.tensor([0.0, 0.5, 1.0, 3.0]),
            ),
            (lambda: torch.zeros(4), source),
            (lambda: make(torch.zeros(4), 0.5, 0, torch.qint8), source),
        ):
            expected, got = dst_of(), dst_of()
            error = outcome(lambda e=expected, s=src: e.copy_(s))
            assert outcome(lambda g=got, s=src: paramkit.copy_(g, s)) is error
            assert _plain(got).tolist() == _plain(expected).tolist()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.int_repr() if tensor.is_quantized else tensor


# Fills.

SCALARS: Sequence[int | float | bool | complex] = (
    0, 1, 5, -1, 127, 128, 255, 256, 300, -128, -129, 65519, 65520, 65535, 65536, 70000,
    2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 2**64, 2**70,
    -(2**63) - 1, -(2**64),
    0.0, -0.0, 0.1, 1.5, -1.5, 2.5, 254.9, 255.5, -0.5, 1e-40, 3e38, 1e39, 1e300, 5e-324,
    math.inf, -math.inf, math.nan, 448.0, 464.0, 465.0, 480.0, 57344.0, 61440.0, 240.0, 250.0,
    True, False, 1j, 1 + 0j, 2.5 - 3j, complex(math.nan, 1), complex(0, math.inf),
)  # fmt: skip


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (), (1,), (0,), (2, 3)], ids=str)
def test_scalars_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every kind of number into every dtype: torch's bits, or torch's error and nothing written.

    The shapes matter: for one element torch converts by another route, with other limits.
    """
    layout = Layout.dense(shape)
    if shape == (2, 3):
        layout = Layout.dense(shape, (7, 2))
    for value in SCALARS:
        what = f"{dtype} {shape} <- {value!r}"
        expected = place(layout, dtype)
        error = outcome(lambda e=expected, v=value: e.fill_(v))
        for ours in (
            lambda dst, v=value: paramkit.fill_(dst, v),
            lambda dst, v=value: paramkit.foreach_fill_([dst], v),
            lambda dst, v=value: paramkit.foreach_fill_([dst], [v]),
        ):
            got = place(layout, dtype)
            snapshot = watch(got)
            assert outcome(lambda g=got, f=ours: f(g)) is error, what
            if error is None:
                assert_same_bits(got, expected, any_nan=True, what=what)
                snapshot.assert_only_inside()
            else:
                snapshot.assert_unwritten()


def test_fill_named_cases() -> None:
    assert paramkit.fill_(torch.zeros(2, dtype=torch.uint8), -1).tolist() == [255, 255]
    big = paramkit.fill_(torch.zeros(2, dtype=torch.uint64), 2**64 - 1)
    assert big.tolist() == [2**64 - 1] * 2
    for dtype, value in (
        (torch.uint8, 256),
        (torch.int8, 128),
        (torch.int32, 2**31),
        (torch.int64, math.nan),
        (torch.int32, math.inf),
        (torch.float16, 1e6),
        (torch.float32, 1j),
    ):
        dst = torch.ones(3, dtype=dtype)
        with nothing_written(dst), pytest.raises(RuntimeError):
            paramkit.fill_(dst, value)


def test_numpy_scalars_as_torch() -> None:
    import numpy

    for value in (
        numpy.float32(1.5),
        numpy.float64(2.5),
        numpy.int64(3),
        numpy.int32(4),
        numpy.bool_(True),
    ):
        for dtype in (torch.float32, torch.int64, torch.bfloat16):
            expected, got = torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype)
            error = outcome(lambda e=expected, v=value: e.fill_(v))
            assert outcome(lambda g=got, v=value: paramkit.fill_(g, v)) is error, repr(value)
            assert_same_bits(got, expected, what=repr(value))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_zero_dim_tensor_values_as_torch(dtype: torch.dtype) -> None:
    """The value of a 0-d tensor is converted as torch's ``fill_`` converts it."""
    for value in (
        torch.tensor(3),
        torch.tensor(2.5),
        torch.tensor(7, dtype=torch.uint8),
        torch.tensor(True),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor(2 + 1j),
        torch.tensor(1.5, dtype=torch.float64).to(torch.float8_e4m3fn),
        torch.tensor(300),
    ):
        expected, got = torch.zeros(4).to(dtype), torch.zeros(4).to(dtype)
        error = outcome(lambda e=expected, v=value: e.fill_(v))
        for ours in (
            lambda g, v=value: paramkit.fill_(g, v),
            lambda g, v=value: paramkit.foreach_fill_([g], [v]),
        ):
            got = torch.zeros(4).to(dtype)
            with nothing_written(*(() if error is None else (got,))):
                assert outcome(lambda g=got, f=ours: f(g)) is error, f"{dtype} <- {value!r}"
            if error is None:
                assert_same_bits(got, expected, any_nan=True, what=f"{dtype} <- {value!r}")
