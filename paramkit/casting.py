"""Which dtype may be written into which, and what values would not survive it.

`can_cast` answers for dtypes alone, with the four names and the meaning of `numpy.can_cast`; `overflows` looks at the
values themselves.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .blocks import boxes, cut
from .errors import Finding, dtype_text
from .interrupts import without_grad

__all__ = [
    "CASTINGS",
    "Overflow",
    "can_cast",
    "check_casting",
    "hint",
    "may_overflow",
    "overflow_finding",
    "overflows",
    "refusal",
]

CASTINGS = ("no", "safe", "same_kind", "unsafe")
"""From the strictest to the most lenient: each allows what the ones before it allow."""


# ---- dtypes --------------------------------------------------------------------------------------


class _Format(NamedTuple):
    """What the values of a float dtype are. torch.finfo has no word of infinities, NaN, zeros and signs, and its
    eps for float8_e5m2fnuz is half the true one."""

    digits: int  # significand bits, the leading one included
    least: int  # log2 of the smallest positive value
    most: float  # the largest finite value
    infinity: bool = True
    minus_zero: bool = True
    zero_and_sign: bool = True
    # All of them have a NaN.


_FORMATS = {
    torch.float64: _Format(53, -1074, float(np.finfo(np.float64).max)),
    torch.float32: _Format(24, -149, float(np.finfo(np.float32).max)),
    torch.float16: _Format(11, -24, 65504.0),
    torch.bfloat16: _Format(8, -133, 255 * 2.0**120),
    torch.float8_e5m2: _Format(3, -16, 57344.0),
    torch.float8_e4m3fn: _Format(4, -9, 448.0, infinity=False),
    torch.float8_e5m2fnuz: _Format(3, -17, 57344.0, infinity=False, minus_zero=False),
    torch.float8_e4m3fnuz: _Format(4, -10, 240.0, infinity=False, minus_zero=False),
    torch.float8_e8m0fnu: _Format(
        1, -127, 2.0**127, infinity=False, minus_zero=False, zero_and_sign=False
    ),
}
_PARTS = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_NUMPY = {
    getattr(torch, name): np.dtype(name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_RANGES = {
    dtype: (int(np.iinfo(_NUMPY[dtype]).min), int(np.iinfo(_NUMPY[dtype]).max))
    for dtype in (*_UNSIGNED, *_SIGNED)
}
# A dtype of powers of two, for scales. To it -2 is 2 and 0 is 2**-127, so it is a kind of its own: the way to it is
# refused as the way from int to uint is, the way from it to another float is not.
_SCALE = torch.float8_e8m0fnu


def _kind(dtype: torch.dtype) -> int | None:
    """numpy's order of kinds: bool, unsigned, signed, float, complex. None for dtypes that hold no plain numbers."""
    if dtype == torch.bool:
        return 0
    if dtype in _UNSIGNED:
        return 1
    if dtype in _SIGNED:
        return 2
    if dtype in _FORMATS:
        return 3
    return 4 if dtype in _PARTS else None


def check_casting(name: object) -> str:
    """The name of a cast policy, if it is one.

    Raises:
        ValueError: another value; the text lists those that exist.

    Example:
        >>> check_casting("safe")
        'safe'
    """
    if isinstance(name, str) and name in CASTINGS:
        return name
    allowed = ", ".join(f'"{c}"' for c in CASTINGS)
    raise ValueError(f"casting must be one of {allowed}; got {name!r}")


@cache
def can_cast(src: torch.dtype, dst: torch.dtype, casting: str) -> bool:
    """Whether a policy lets values of one dtype be written into another.

    Between dtypes that numpy has, this is `numpy.can_cast`. bfloat16, the float8 dtypes and complex32 follow the same
    ideas:

    - "no": the same dtype.
    - "safe": every value of `src` is a value of `dst`, infinities, NaN and -0.0 included. (numpy counts 64-bit integers
      to float64 among these, though large ones are rounded.)
    - "same_kind": "safe", or to the same or a later kind of bool, unsigned, signed, float, complex. float32 to float16
      is within it; int to uint, float to int, complex to float are not. Nor is anything but itself to float8_e8m0fnu,
      which has neither zero nor sign.
    - "unsafe": anything that torch can copy.

    A dtype that holds no plain numbers (quantized, packed) is within each policy to itself, else only within "unsafe".

    Raises:
        ValueError: an unknown policy.

    Example:
        >>> can_cast(torch.float8_e4m3fn, torch.bfloat16, "safe"), can_cast(torch.bfloat16, torch.float16, "safe")
        (True, False)
        >>> can_cast(torch.bfloat16, torch.float16, "same_kind"), can_cast(torch.float32, torch.int64, "same_kind")
        (True, False)
    """
    check_casting(casting)
    if src == dst or casting == "unsafe":
        return True
    if casting == "no":
        return False
    if src in _NUMPY and dst in _NUMPY:
        return bool(np.can_cast(_NUMPY[src], _NUMPY[dst], casting))  # type: ignore[arg-type]
    if _is_exact(src, dst):
        return True
    before, after = _kind(src), _kind(dst)
    if casting == "safe" or before is None or after is None or dst == _SCALE:
        return False
    return before <= after


def _is_exact(src: torch.dtype, dst: torch.dtype) -> bool:
    """Whether every value of `src` is one of `dst`, a float or complex dtype; False for all other `dst`."""
    to = _FORMATS.get(_PARTS.get(dst, dst))
    if to is None or (src in _PARTS and dst not in _PARTS):
        return False
    if src == torch.bool:
        return to.zero_and_sign
    if src in _RANGES:
        largest = max(-_RANGES[src][0], _RANGES[src][1])
        return to.zero_and_sign and largest <= min(2**to.digits, to.most)
    own = _FORMATS.get(_PARTS.get(src, src))
    return (
        own is not None
        and own.digits <= to.digits
        and own.least >= to.least
        and own.most <= to.most
        and own.infinity <= to.infinity
        and own.minus_zero <= to.minus_zero
        and own.zero_and_sign <= to.zero_and_sign
    )


def refusal(src: torch.dtype, dst: torch.dtype, casting: str) -> str | None:
    """What a policy says against a cast, for a finding's text; None where it allows it.

    Raises:
        ValueError: an unknown policy.

    Example:
        >>> refusal(torch.float32, torch.int64, "same_kind")
        'float32 to int64 is not within casting="same_kind"'
    """
    if can_cast(src, dst, casting):
        return None
    return f'{dtype_text(src)} to {dtype_text(dst)} is not within casting="{casting}"'


def hint(src: torch.dtype, dst: torch.dtype) -> str:
    """What to do about a refused cast: the strictest policy that allows it.

    Example:
        >>> hint(torch.float32, torch.bfloat16)
        'casting="same_kind" allows it'
    """
    least = next(c for c in CASTINGS if can_cast(src, dst, c))
    text = f'casting="{least}" allows it'
    same_size = src in _RANGES and src.itemsize == dst.itemsize
    if same_size and dst in _FORMATS and dst.itemsize == 1:  # bytes of a file without float8
        return f"{text}; where the bytes are meant and not the numbers, pass source.view({dst})"
    return text


# ---- values --------------------------------------------------------------------------------------


class Overflow(NamedTuple):
    """Values that a conversion would lose.

    Attributes:
        elements: how many.
        first: the index of the first one, in row-major order; () in a tensor without dimensions.
        value: the value of that element.
    """

    elements: int
    first: tuple[int, ...]
    value: bool | int | float | complex


def overflows(dst_dtype: torch.dtype, src_view: Tensor, limit: int = 1 << 20) -> Overflow | None:
    """The elements that do not survive a conversion, found without writing anything.

    Lost is, by what `copy_` of the installed torch does on the device of `src_view`:

    - a finite value that becomes infinite or NaN;
    - a value that becomes the largest finite one although it is larger even after rounding: torch 2.13 and later
      does so for float8_e4m3fn, where a value beyond 464, an infinity too, becomes 448 (before, it became NaN);
    - a negative value that becomes a positive one (float8_e8m0fnu has no sign);
    - for integers, a value that is out of the destination's range after truncation towards zero, infinities and NaN
      among them, whatever it becomes.

    Not lost, though not the same: what is rounded or becomes zero (for float8_e8m0fnu, 2**-127), an infinity that
    becomes NaN, the imaginary part that a real dtype cannot have, and anything as a bool. A complex
    value is lost where either part is.

    Args:
        dst_dtype: the dtype of the destination.
        src_view: any shape and strides, on any device with memory. It is read once, and twice where values are lost.
        limit: bytes of memory that this may take, about; at least 1024.

    Returns:
        None where nothing is lost.

    Example:
        >>> overflows(torch.float16, torch.tensor([[1.0, 7e4], [float("inf"), -1e9]]))
        Overflow(elements=2, first=(0, 1), value=70000.0)
        >>> overflows(torch.int8, torch.tensor([127.9, -128.5]))
    """
    if src_view.numel() == 0 or not may_overflow(src_view.dtype, dst_dtype, src_view.device.type):
        return None
    return without_grad(partial(_search, dst_dtype, src_view.detach(), max(32, limit // 32)))


def may_overflow(src: torch.dtype, dst: torch.dtype, device: str = "cpu") -> bool:
    """Whether `overflows` could find anything between these dtypes. Kept after the first call.

    Args:
        src: the dtype of the source.
        dst: the dtype of the destination.
        device: the type of the source's device: conversions may differ between devices.

    Example:
        >>> may_overflow(torch.float32, torch.float16), may_overflow(torch.float16, torch.float32)
        (True, False)
    """
    return _kept(src, dst, device) is not None


def overflow_finding(name: str, source: str, dst_dtype: torch.dtype, lost: Overflow) -> Finding:
    """An `Overflow` as a finding of kind "overflow".

    Args:
        name: the destination's name.
        source: the source's name.
        dst_dtype: the destination's dtype.
        lost: what `overflows` returned.

    Example:
        >>> print(overflow_finding("b", "a", torch.float16, Overflow(3, (0, 7), 1e6)))
        b | overflow | got 3 values of a, the first [0, 7] = 1000000.0 | expected values that float16 can hold
    """
    where = str(list(lost.first)) if lost.first else "it"
    values = "a value" if lost.elements == 1 else f"{lost.elements} values"
    first = "" if lost.elements == 1 else "the first "
    got = f"{values} of {source}, {first}{where} = {lost.value}"
    return Finding(name, "overflow", got, f"values that {dtype_text(dst_dtype)} can hold")


def _search(dst: torch.dtype, src: Tensor, elements: int) -> Overflow | None:
    if src.numel() <= elements and _all_kept(src, dst):  # many small tensors: nothing to set up
        return None
    # Repeated elements are looked at once. In the order of memory most views are contiguous, which needs no copy.
    times = 1
    for d, (n, stride) in enumerate(zip(src.shape, src.stride())):
        if n > 1 and stride == 0:
            src, times = src.narrow(d, 0, 1), times * n
    strides = src.stride()
    order = sorted(range(src.dim()), key=lambda d: -strides[d])
    memory = src.permute(order)
    back = sorted(range(len(order)), key=order.__getitem__)
    real = (
        not src.dtype.is_complex or dst.is_complex
    )  # else every second float is skipped: no dense memory
    plain = src.dtype in _HAVE_AMINMAX and real and not (src.is_conj() or src.is_neg())
    large = 1 << 22 if plain and memory.is_contiguous() else elements

    count, first = 0, None
    for box in boxes(memory.shape, large):
        block = cut(memory, box)
        if _all_kept(block, dst):
            continue
        for inner in boxes(block.shape, elements):
            lost = _lost(_parts(cut(block, inner), dst), dst)
            if dst.is_complex and src.is_complex():
                lost = lost.any(-1)
            found = int(lost.sum())
            if not found:
                continue
            count += found
            start = [a + b for (a, _), (b, _) in zip(box, inner)]
            index = _first_index(lost.permute(back), [start[d] for d in back])
            first = index if first is None or index < first else first
    if first is None:
        return None
    return Overflow(count * times, first, src[first].item())


def _first_index(mask: Tensor, start: list[int]) -> tuple[int, ...]:
    flat = int(mask.reshape(-1).view(torch.uint8).argmax())
    index = []
    for n in reversed(mask.shape):
        flat, i = divmod(flat, n)
        index.append(i)
    return tuple(a + b for a, b in zip(start, reversed(index)))


_HAVE_AMINMAX = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.uint8, *_SIGNED, torch.complex64, torch.complex128, torch.complex32),
)


def _parts(block: Tensor, dst: torch.dtype) -> Tensor:
    """The real numbers that a conversion to `dst` looks at; complex to complex: [.., 2]."""
    if not block.is_complex():
        return block.resolve_neg()
    pairs = torch.view_as_real(block.resolve_conj().resolve_neg())
    return pairs if dst.is_complex else pairs[..., 0]


def _all_kept(block: Tensor, dst: torch.dtype) -> bool:
    """Whether the extremes of a block say that nothing in it is lost. False may mean that a NaN hides them."""
    kept = _kept(block.dtype, dst, block.device.type)
    assert kept is not None
    x = _parts(block, dst)
    if x.dtype == torch.uint64:
        low, high = (e.item() for e in _signed(x).aminmax())
        if low < 0:  # from 2**63 on
            low, high = 0, 2**64 - 1
    else:
        low, high = (e.item() for e in _carried(x).aminmax())
    return bool(kept[0] <= low and high <= kept[1])


def _signed(x: Tensor) -> Tensor:
    """The bits of unsigned 64-bit numbers as signed ones: torch compares no others."""
    return x.view(torch.int64)


def _carried(x: Tensor) -> Tensor:
    """The same values in a dtype that torch can compare."""
    if x.dtype == torch.uint16:
        return x.to(torch.int32)
    if x.dtype == torch.uint32:
        return x.to(torch.int64)
    return x.to(torch.float32) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x


def _lost(x: Tensor, dst: torch.dtype) -> Tensor:
    """Which of the real numbers `x` are lost in `dst` (or in its parts), by converting them. [..] bool"""
    dst = _PARTS.get(dst, dst)
    if dst in _RANGES:
        least, most = _RANGES[dst]
        if x.dtype == torch.uint64:
            bits = _signed(x)
            large = bits < 0
            return torch.zeros_like(large) if most >= 2**64 - 1 else large | (bits > most)
        if x.dtype in _RANGES:
            v = x.to(torch.int64)
            return (v < least) | (v > min(most, 2**63 - 1))
        # Exact: the bounds are powers of two, or 0. A NaN is in no range.
        whole = x.to(torch.float64).trunc()
        return ~((whole >= float(least)) & (whole < float(most + 1)))

    y = x.to(dst)
    finite_after = (y.to(torch.float32) if dst.itemsize == 1 else y).isfinite()
    if x.dtype in _RANGES:
        lost = ~finite_after
    else:
        x = _carried(x)
        finite = x.isfinite()
        lost = (finite & ~finite_after) | (x.isinf() & finite_after)
        x = x.where(finite, 0)  # infinities are dealt with
    if dst == _SCALE and x.dtype not in _UNSIGNED:
        lost |= x < 0
    if dst.itemsize == 1 and _saturates(dst, x.device.type):
        form = _FORMATS[dst]
        step = _top_step(form)
        size = x.to(torch.float32).abs()  # as torch rounds to float8
        # Half way between two values goes to the even one.
        odd = int(form.most / step) % 2 == 1
        edge = form.most + step / 2
        lost |= size >= edge if odd else size > edge
    return lost


def _top_step(form: _Format) -> float:
    """How far the largest value of a format is from the one below it."""
    return float(2.0 ** (np.frexp(form.most)[1] - form.digits))


@cache
def _saturates(dst: torch.dtype, device: str) -> bool:
    """Whether torch turns what is too large for a float8 dtype into its largest value."""
    large = torch.full((1,), 3e38, device=device).to(dst).to(torch.float32)
    return bool(large.isfinite()) and float(large) == _FORMATS[dst].most


Number = int | float


@cache
def _kept(src: torch.dtype, dst: torch.dtype, device: str) -> tuple[Number, Number] | None:
    """The interval of values of `src` (parts, for complex) that are not lost in `dst`; None where none can be lost."""
    own, to = _PARTS.get(src, src), _PARTS.get(dst, dst)
    if src == dst or torch.bool in (own, to) or _kind(own) is None or _kind(to) is None:
        return None
    if own in _RANGES:
        ends = torch.tensor(_RANGES[own], dtype=own, device=device)
    else:
        ends = _special(own, device)
    if not bool(_lost(ends, to).any()):
        return None
    return _last_kept(own, to, device, -1), _last_kept(own, to, device, 1)


def _special(dtype: torch.dtype, device: str) -> Tensor:
    """The largest value of a float dtype, its negative, the infinities and NaN, as far as it has them."""
    form, top = _FORMATS[dtype], _bits_of_most(dtype)
    values = [_value(dtype, top, 1, device)]
    if form.zero_and_sign:
        values.append(_value(dtype, top, -1, device))
    special = [float("nan")] + [float("inf"), -float("inf")] * form.infinity
    exact = torch.tensor(special, dtype=torch.float32, device=device).to(dtype)
    return torch.cat([*(v.view(torch.uint8) for v in values), exact.view(torch.uint8)]).view(dtype)


def _bits_of_most(dtype: torch.dtype) -> int:
    """The bit pattern of the largest finite value: positive floats are ordered as their bits are."""
    value = torch.tensor(_FORMATS[dtype].most, dtype=torch.float64).to(dtype).reshape(1)
    return int.from_bytes(value.view(torch.uint8).numpy().tobytes(), "little")


def _value(dtype: torch.dtype, bits: int, sign: int, device: str) -> Tensor:
    """The float of a bit pattern, [1]."""
    if sign < 0:
        bits |= 1 << (8 * dtype.itemsize - 1)
    raw = bytearray(bits.to_bytes(dtype.itemsize, "little"))
    return torch.frombuffer(raw, dtype=dtype).to(device)


def _last_kept(own: torch.dtype, to: torch.dtype, device: str, sign: int) -> Number:
    """The largest value of `own` that is kept in `to`; for sign -1, the smallest."""
    if own in _RANGES:
        least, most = _RANGES[own]
        far = most if sign > 0 else -least

        def make(k: int) -> Tensor:
            return torch.tensor([sign * k], dtype=own, device=device)
    else:
        if sign < 0 and not _FORMATS[own].zero_and_sign:
            return 0
        far = _bits_of_most(own)

        def make(k: int) -> Tensor:
            return _value(own, k, sign, device)

    # Every dtype keeps zero, and the smallest value of a dtype that has no zero.
    kept, lost = 0, far + 1
    while lost - kept > 1:
        middle = (kept + lost) // 2
        if bool(_lost(make(middle), to)):
            lost = middle
        else:
            kept = middle
    if kept == 0 and sign < 0:  # where there is no -0.0, its bits are a NaN
        return 0
    number: Number = make(kept).item()
    return number
