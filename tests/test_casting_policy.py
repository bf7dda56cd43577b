"""Cast policies against numpy, and against every value of the small dtypes; lost values against plain arithmetic."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from paramkit.blocks import boxes, cut
from paramkit.casting import (
    CASTINGS,
    Overflow,
    can_cast,
    check_casting,
    hint,
    may_overflow,
    overflow_finding,
    overflows,
    refusal,
)
from tests.cases import COMPLEX, DTYPES, FLOAT8, INTEGERS
from tests.guards import bits
from tests.test_casts import every_value

NUMPY = {d: np.dtype(str(d).removeprefix("torch.")) for d in (*INTEGERS, torch.bool)}
NUMPY |= {
    d: np.dtype(str(d).removeprefix("torch."))
    for d in (torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)
}
BEYOND_NUMPY = [d for d in DTYPES if d not in NUMPY]
FLOATS = [d for d in DTYPES if d.is_floating_point]
REAL = [d for d in DTYPES if not d.is_complex]
E4M3FN_SATURATES = math.isfinite(torch.tensor([1e9]).to(torch.float8_e4m3fn).float().item())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings()
    ):  # torch warns of complex32, and of imaginary parts that it drops
        warnings.simplefilter("ignore", UserWarning)
        yield


def test_lists_are_complete() -> None:
    assert len(NUMPY) == 14
    assert set(BEYOND_NUMPY) == {torch.bfloat16, torch.complex32, *FLOAT8}


# ---- the policies --------------------------------------------------------------------------------


@pytest.mark.parametrize("casting", CASTINGS)
def test_as_numpy_where_numpy_has_both(casting: str) -> None:
    for src, dst in itertools.product(NUMPY, repeat=2):
        expected = np.can_cast(NUMPY[src], NUMPY[dst], casting)
        assert can_cast(src, dst, casting) == expected, (src, dst)


def values_of(dtype: torch.dtype) -> Tensor:
    """All values of a dtype of up to 16 bits, every one that could matter of a wider integer."""
    if dtype == torch.complex32:  # each value of one part beside a few of the other
        parts = every_value(torch.float16)
        pairs = [torch.stack([parts, torch.full_like(parts, v)], 1) for v in (0.0, 1.5, math.inf)]
        return torch.view_as_complex(torch.cat([*pairs, *(p.flip(1) for p in pairs)]))
    if dtype in INTEGERS and dtype.itemsize > 2:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        near = {s * 2**k + d for k in range(65) for s in (1, -1) for d in (-1, 0, 1)} | {0}
        return torch.tensor([v for v in sorted(near) if low <= v <= high], dtype=dtype)
    if dtype in (torch.float32, torch.float64):
        info = torch.finfo(dtype)
        return torch.cat([every_value(dtype), torch.tensor([info.max, info.min], dtype=dtype)])
    return every_value(dtype)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Whether elements are equal as numbers: any NaN is any NaN, -0.0 is not 0.0."""
    if a.is_complex():
        a, b = (torch.view_as_real(t) for t in (a, b))
        return same(a, b).all(-1)
    if not a.is_floating_point():
        return a == b
    x, y = a.to(torch.float64), b.to(torch.float64)
    return (x.isnan() & y.isnan()) | ((x == y) & (x.signbit() == y.signbit()))


def survives(src: torch.dtype, dst: torch.dtype) -> bool:
    """Whether all values come back from `dst` as they were. Only right where nothing can be lost and found again."""
    values = values_of(src)
    return bool(same(values, values.to(dst).to(src)).all())


@pytest.mark.parametrize("src", DTYPES, ids=str)
def test_safe_is_what_survives(src: torch.dtype) -> None:
    """All values through torch, there and back, for every pair with a dtype that numpy lacks."""
    for dst in DTYPES:
        if dst == src or (src in NUMPY and dst in NUMPY):
            continue
        got = can_cast(src, dst, "safe")
        if dst in INTEGERS or dst == torch.bool or (src.is_complex and not dst.is_complex):
            assert not got, (src, dst)  # there and back would find some: a bool is no number
        elif src in (torch.float32, torch.float64) or src in (torch.complex64, torch.complex128):
            assert not got, (src, dst)  # wider than every dtype that numpy lacks
            assert not survives(src, dst), (src, dst)
        else:
            assert got == survives(src, dst), (src, dst)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_formats(dtype: torch.dtype) -> None:
    """What the policies know about a dtype is what its values are."""
    from paramkit.casting import _FORMATS

    form = _FORMATS[dtype]
    if dtype.itemsize <= 2:
        x = every_value(dtype).to(torch.float64)
        finite = x[x.isfinite()]
        assert form.most == finite.max()
        assert 2.0**form.least == finite[finite > 0].min()
        assert form.infinity == bool(x.isinf().any())
        assert form.minus_zero == bool((finite.signbit() & (finite == 0)).any())
        assert form.zero_and_sign == bool((finite == 0).any()) == bool((finite < 0).any())
        assert x.isnan().any()
        next_to_one = finite[finite > 1].min()
        assert 2.0 ** (1 - form.digits) == next_to_one - 1
    else:
        info = torch.finfo(dtype)
        assert (form.most, 2.0 ** (1 - form.digits)) == (info.max, info.eps)
        assert 2.0**form.least == info.smallest_normal * info.eps


def kind(dtype: torch.dtype) -> int:
    if dtype == torch.bool:
        return 0
    if dtype.is_complex:
        return 4
    return 3 if dtype.is_floating_point else 1 + dtype.is_signed


def test_same_kind_beyond_numpy() -> None:
    for src, dst in itertools.product(DTYPES, repeat=2):
        expected = kind(src) <= kind(dst)
        if dst == torch.float8_e8m0fnu:
            expected = src == dst
        assert can_cast(src, dst, "same_kind") == expected, (src, dst)
        assert can_cast(src, dst, "unsafe")
        assert can_cast(src, dst, "no") == (src == dst)


def test_each_policy_allows_what_a_stricter_one_does() -> None:
    for src, dst in itertools.product(DTYPES, repeat=2):
        allowed = [can_cast(src, dst, c) for c in CASTINGS]
        assert allowed == sorted(allowed), (src, dst)


def test_dtypes_that_hold_no_numbers() -> None:
    assert can_cast(torch.qint8, torch.qint8, "no")
    assert not can_cast(torch.qint8, torch.int8, "same_kind")
    assert not can_cast(torch.bool, torch.quint8, "same_kind")
    assert not can_cast(torch.float8_e5m2, torch.bits8, "safe")
    assert not may_overflow(torch.qint8, torch.int8)
    assert not may_overflow(torch.float32, torch.qint8)


@pytest.mark.parametrize("name", ["SAFE", "equiv", "", None, 1, ["safe"]])
def test_unknown_policy(name: object) -> None:
    with pytest.raises(ValueError, match='"no", "safe", "same_kind", "unsafe"; got') as error:
        check_casting(name)
    assert repr(name) in str(error.value)


def test_texts() -> None:
    assert [check_casting(c) for c in CASTINGS] == list(CASTINGS)
    with pytest.raises(ValueError, match="casting must be one of"):
        can_cast(torch.int8, torch.int8, "equiv")
    assert refusal(torch.float16, torch.float32, "safe") is None
    assert (
        refusal(torch.bfloat16, torch.float16, "safe")
        == 'bfloat16 to float16 is not within casting="safe"'
    )
    assert hint(torch.float16, torch.float32) == 'casting="safe" allows it'
    assert hint(torch.float32, torch.int64) == 'casting="unsafe" allows it'
    assert "source.view(torch.float8_e4m3fn)" in hint(torch.uint8, torch.float8_e4m3fn)
    assert "source.view(torch.float8_e8m0fnu)" in hint(torch.uint8, torch.float8_e8m0fnu)
    assert "view" not in hint(torch.int16, torch.float16)


# ---- boxes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (3, 5), (2, 1, 9), (4, 3, 2, 5), (1, 1, 1), (100, 2)]
)
def test_boxes_are_the_whole_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for elements in range(1, whole.numel() + 2):
        parts = [cut(whole, box) for box in boxes(shape, elements)]
        assert torch.cat([p.reshape(-1) for p in parts]).equal(whole.reshape(-1))
        assert all(p.numel() <= elements for p in parts)
        rest = math.prod(shape) / (elements / 2)
        assert len(parts) <= max(1, 2 * math.ceil(rest))


def test_no_boxes_of_an_empty_shape() -> None:
    assert list(boxes((3, 0, 2), 4)) == []


# ---- values --------------------------------------------------------------------------------------


def is_lost(x: bool | int | float, dst: torch.dtype, after: float) -> bool:
    """By plain arithmetic: whether a real number is lost in `dst`, where torch makes `after` of it."""
    if dst == torch.bool:
        return False
    if dst in INTEGERS:
        info = torch.iinfo(dst)
        return not math.isfinite(x) or not info.min <= int(x) <= info.max
    if math.isnan(x):
        return False
    if math.isinf(x):
        return math.isfinite(after)
    if not math.isfinite(after):
        return True
    if dst == torch.float8_e8m0fnu:
        return x < 0
    if dst == torch.float8_e4m3fn and E4M3FN_SATURATES:
        # As rounded if there were larger values, steps of 32 apart; torch rounds to float32 before.
        return abs(x) > 1e6 or round(abs(float(np.float32(x))) / 32) * 32 > 448
    return False


def text(lost: Overflow | None) -> str:
    """For comparisons in which a NaN is equal to a NaN."""
    return repr(lost)


def expected(x: Tensor, dst: torch.dtype) -> Overflow | None:
    after = x.to(dst).to(torch.float64).tolist()
    found = [i for i, (a, b) in enumerate(zip(x.tolist(), after)) if is_lost(a, dst, b)]
    return Overflow(len(found), (found[0],), x[found[0]].item()) if found else None


@pytest.mark.parametrize("src", REAL, ids=str)
def test_every_pair(src: torch.dtype) -> None:
    x = values_of(src)
    for dst in REAL:
        want = expected(x, dst)
        assert text(overflows(dst, x)) == text(want), dst
        assert may_overflow(src, dst) == (want is not None), dst
        if want is None:
            continue
        # One value at a time at the edges: the interval that is let through at once is the right one.
        one = [v for v in x.unsqueeze(1) if overflows(dst, v)] if len(x) < 2000 else None
        assert one is None or len(one) == want.elements


@pytest.mark.parametrize("dst", [*FLOATS, torch.int8, torch.uint16, torch.int64], ids=str)
@pytest.mark.parametrize("src", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_at_the_edge(src: torch.dtype, dst: torch.dtype) -> None:
    """Values one step apart around each end of the range, each alone, so that no other decides."""
    info = torch.iinfo(dst) if dst in INTEGERS else torch.finfo(dst)
    own = torch.tensor([float(info.max), float(info.min)], dtype=torch.float64).to(src)
    x = own[own.isfinite()]
    steps = [x]
    for factor in (1.0, 1 + 1 / 256, 1 + 1 / 64, 1 + 1 / 32, 1.0625, 1.125, 1.25, 1.5, 2.0):
        middle = (x.double() * factor).to(src)
        up = torch.nextafter(middle, torch.full_like(middle, math.inf))
        steps += [middle, up, torch.nextafter(middle, torch.full_like(middle, -math.inf))]
    lost = [v for v in torch.cat(steps) if overflows(dst, v)]
    want = [
        v for v in torch.cat(steps) if is_lost(v.item(), dst, v.to(dst).to(torch.float64).item())
    ]
    assert [v.item() for v in lost] == [v.item() for v in want]


def reference(x: Tensor, dst: torch.dtype) -> Overflow | None:
    """Any shape: the plain answer from a plain copy of the tensor."""
    flat = expected(x.contiguous().reshape(-1), dst)
    if flat is None:
        return None
    index = tuple(int(i) for i in np.unravel_index(flat.first[0], x.shape))
    return Overflow(flat.elements, index, flat.value)


def strided(kind: str) -> Tensor:
    base = torch.randn(9, 14, 22) * 100
    return {
        "contiguous": base,
        "permuted": base.permute(2, 0, 1),
        "reversed axes": base.permute(2, 1, 0),
        "steps": base[::2, 1::3, ::5],
        "offset": base[3:, :, 7:9],
        "expanded": base[:, :1, :].expand(9, 14, 22),
        "expanded in front": base[0, :, 0].expand(5, 3, 14),
        "one element": base[3, 4, 5],
        "channels last": base.view(1, 9, 14, 22).contiguous(memory_format=torch.channels_last),
        "sizes of one": base[:, None, :, None, 5:6],
    }[kind]


LAYOUTS = [
    *("contiguous", "permuted", "reversed axes", "steps", "offset", "expanded"),
    *("expanded in front", "one element", "channels last", "sizes of one"),
]


@pytest.mark.parametrize("limit", [1024, 5000, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, limit: int) -> None:
    x = strided(layout)
    assert overflows(torch.int8, x, limit) == reference(x, torch.int8)
    rare = x.clone()  # keeps the strides of dense tensors only, so both are looked at
    flat = rare.reshape(-1)
    for dst in (torch.float8_e4m3fn, torch.float8_e5m2fnuz, torch.uint8):
        assert overflows(dst, x, limit) == reference(x, dst)
    if x.numel() > 1 and flat.data_ptr() == rare.data_ptr():
        flat.zero_()
        assert overflows(torch.float16, rare, limit) is None
        flat[-1] = -1e30
        assert overflows(torch.float16, rare, limit) == Overflow(
            1, tuple(n - 1 for n in rare.shape), rare.reshape(-1)[-1].item()
        )
        flat[-2] = math.nan
        assert overflows(torch.float16, rare, limit).elements == 1  # type: ignore[union-attr]
        assert overflows(torch.int64, rare, limit).elements == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("src", REAL, ids=str)
def test_layouts_of_every_dtype(src: torch.dtype) -> None:
    x = every_value(src)[:200].reshape(10, 20).t()[1:, ::3]
    for dst in REAL:
        assert text(overflows(dst, x, 1024)) == text(reference(x, dst)), dst


def test_beyond_one_large_block() -> None:
    x = torch.zeros(2, (1 << 22) + 5)
    x[1, -1] = 1e6
    x[1, 3] = -math.inf
    assert overflows(torch.float16, x) == Overflow(1, (1, (1 << 22) + 4), 1e6)
    assert overflows(torch.float16, x.t()) == Overflow(1, ((1 << 22) + 4, 1), 1e6)
    x[0, 1 << 22] = -1e7
    assert overflows(torch.float16, x) == Overflow(2, (0, 1 << 22), -1e7)
    assert overflows(torch.float16, x.t()) == Overflow(2, (1 << 22, 0), -1e7)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert overflows(torch.int8, torch.empty(shape)) is None


@pytest.mark.parametrize("src", COMPLEX, ids=str)
def test_complex(src: torch.dtype) -> None:
    x = torch.tensor([[1 + 2j, 3e4 - 2j, 1 + 6e4j], [complex(math.inf, 1), -1, 6e4 + 6e4j]])
    x = x.to(src)
    # To a real dtype the imaginary part is dropped by torch, so only the real one counts.
    assert overflows(torch.int16, x) == Overflow(2, (1, 0), x[1, 0].item())
    assert overflows(torch.int16, x.t()) == Overflow(2, (0, 1), x[1, 0].item())
    assert overflows(torch.int16, x.conj()) == Overflow(2, (1, 0), x[1, 0].conj().item())
    if src == torch.complex32:
        assert overflows(torch.complex64, x) is None
        return
    wide = torch.tensor([[1 + 2j, 1e5 - 2j], [1 + 1e5j, -1e5 + 1e5j], [1, math.inf]]).to(src)
    for view, first in (
        (wide, (0, 1)),
        (wide[::2], (0, 1)),
        (wide[1:], (0, 0)),
        (wide.t(), (0, 1)),
    ):
        flat = torch.view_as_real(view.contiguous()).reshape(-1, 2)
        bad = ((flat.abs() > 65520) & flat.isfinite()).any(1)
        got = overflows(torch.complex32, view)
        assert got == Overflow(int(bad.sum()), first, view[first].item())
        assert overflows(torch.complex32, view.conj()) == got._replace(
            value=view[first].conj().item()
        )
    assert overflows(torch.complex32, torch.tensor([1.0, 1e6])) == Overflow(1, (1,), 1e6)
    assert overflows(torch.complex64, torch.tensor([1.0, 1e300], dtype=torch.float64)) == (
        Overflow(1, (1,), 1e300)
    )


def test_negated_views() -> None:
    x = torch.tensor([1 + 300j, 2 - 5j]).conj().imag
    assert x.is_neg()
    assert overflows(torch.int8, x) == Overflow(1, (0,), -300.0)
    assert overflows(torch.uint8, x[:1]) == Overflow(1, (0,), -300.0)
    assert overflows(torch.uint8, x[1:]) is None


def test_parameters_and_inference() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1e9]))
    assert overflows(torch.float16, weight) == Overflow(1, (1,), 1e9)
    with torch.inference_mode():
        assert overflows(torch.float16, torch.tensor([1e9]) * 1) == Overflow(1, (0,), 1e9)


def test_finding() -> None:
    got = overflows(torch.float16, torch.tensor(7e4))
    assert got is not None
    finding = overflow_finding("w", "src.w", torch.float16, got)
    assert finding.kind == "overflow"
    assert finding.got == "a value of src.w, it = 70000.0"
    assert finding.expected == "values that float16 can hold"


@pytest.mark.parametrize("src", DTYPES, ids=str)
def test_the_source_is_only_read(src: torch.dtype) -> None:
    x = values_of(src)[:1000]
    before, version = bits(x).clone(), x._version
    for dst in DTYPES:
        for view in (x, x[::2], x.view(1, -1).t()):
            overflows(dst, view, 1024)
            assert bits(x).equal(before), dst
            assert x._version == version


_PEAK = """
import torch
from paramkit.casting import overflows
from torch.utils._python_dispatch import TorchDispatchMode
largest = 0
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        global largest
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != memory:
                largest = max(largest, t.untyped_storage().nbytes())
        return out
base = torch.randn(3000, 3000)
memory = base.untyped_storage().data_ptr()
for x in (base, base.t(), base[::2, ::2], base[:, :1].expand(3000, 3000)):
    for dst in (torch.int8, torch.float16, torch.float8_e4m3fn):
        with Watch():
            overflows(dst, x, 1 << 20)
print(largest)
"""


def test_memory_is_bounded() -> None:
    """No tensor that is made on the way is larger than the limit (aminmax itself may copy a block)."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= 1 << 20
