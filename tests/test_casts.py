"""Every cast against torch: 8- and 16-bit sources with all their values, wider ones by edges and random bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import paramkit
from tests.cases import FLOAT8, INTEGERS, random_bits
from tests.guards import Layout, bits, place, storage_bytes, watch
from tests.routes import routes_of

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, *FLOAT8, *INTEGERS, torch.bool)
WIDE_INTEGERS = (torch.int32, torch.int64, torch.uint32, torch.uint64)

EDGES = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.0, float("inf"), -float("inf"), float("nan")),
    *(240.0, 248.0, 256.0, 448.0, 464.0, 465.0, 480.0, 57344.0, 61440.0, 65504.0, 65519.0),
    *(65520.0, 65536.0, 127.0, 128.0, 255.0, 256.0, -128.0, -129.0, 32767.0, 32768.0),
    *(2.0**31 - 1, 2.0**31, 2.0**32, 2.0**63, 2.0**64, 2.0**70, -(2.0**31), -(2.0**63), 3.3895e38),
    *(2.0**-6, 2.0**-7, 2.0**-9, 2.0**-10, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-126, 2.0**-133),
    *(2.0**-127, 2.0**-128, 1.5 * 2.0**-127, 2.0**-149, 1.0 + 2.0**-8, 1.0 + 2.0**-9),
)  # fmt: skip


def every_value(dtype: torch.dtype) -> Tensor:
    """All values of a dtype of 8 or 16 bits; else edges, values of all magnitudes, random bits."""
    width = torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.tensor([False, True] * 200)
    if width == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    if width == 2:
        return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    noise = random_bits((20_000,), dtype, seed=7)
    if not dtype.is_floating_point:
        return torch.cat([noise, torch.arange(-300, 300).to(dtype)])
    torch.manual_seed(7)
    scales = (1e-42, 1e-38, 1e-6, 1e-3, 1.0, 300.0, 5e4, 1e6, 3e9, 1e19)
    sizes = [torch.randn(2000, dtype=dtype) * scale for scale in scales]
    return torch.cat([noise, *sizes, torch.tensor(EDGES, dtype=dtype)])


def is_nan(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=torch.bool)
    return tensor.to(torch.float64).isnan()


def assert_as_torch(got: Tensor, source: Tensor) -> None:
    """Equal to what torch's copy_ gives, by its vector path or its scalar path: they differ out of range."""
    vector = torch.empty(source.shape, dtype=got.dtype).copy_(source)
    assert got.is_contiguous()
    if torch.equal(storage_bytes(got), storage_bytes(vector)):
        return  # nearly all of 2**32 values; what follows takes 20 times as long
    strided = torch.empty(2 * source.numel(), dtype=got.dtype)[::2]
    spread = torch.empty(2 * source.numel(), dtype=source.dtype)[::2]
    scalar = strided.copy_(spread.copy_(source)).contiguous()
    good = (bits(got) == bits(vector)).all(1) | (bits(got) == bits(scalar)).all(1)
    good |= is_nan(got) & is_nan(vector)
    if got.dtype in WIDE_INTEGERS:  # NaN as an integer: docs/semantics.md
        good |= is_nan(source)
    wrong = (~good).nonzero().flatten()
    assert len(wrong) == 0, (
        f"{source.dtype} -> {got.dtype}: {len(wrong)} of {got.numel()} differ, first "
        f"{source[wrong[0]].item()!r}: got {got[wrong[0]].item()!r}, torch {vector[wrong[0]].item()!r}"
    )


@pytest.mark.parametrize("src", DTYPES, ids=str)
def test_every_value_of_every_cast(backend: str, src: torch.dtype) -> None:
    source = every_value(src)
    for dst in DTYPES:
        if dst == src:
            continue
        got = torch.empty(source.shape, dtype=dst)
        with paramkit.backend.trace() as trace:
            paramkit.copy_(got, source)
        if backend != "native":
            assert (trace.routes, trace.casts) == (routes_of(backend, copy=1), 1)
        assert_as_torch(got, source)


@pytest.mark.parametrize("src", (*FLOAT8, torch.float16, torch.bfloat16), ids=str)
def test_every_value_in_a_tail(backend: str, src: torch.dtype) -> None:
    """In runs shorter than any vector: what remains behind the vectors is converted by other code."""
    pieces = every_value(src).flatten().split(7)
    for dst in DTYPES:
        if dst == src:
            continue
        got = [torch.empty(piece.shape, dtype=dst) for piece in pieces]
        paramkit.foreach_copy_(got, list(pieces))
        assert_as_torch(torch.cat(got), every_value(src).flatten())


@pytest.mark.slow
@pytest.mark.parametrize("src", (torch.float32, torch.int32), ids=str)
def test_every_32_bit_value(compiled: str, src: torch.dtype) -> None:
    block = 1 << 24
    targets = [d for d in DTYPES if d != src]
    for start in range(-(1 << 31), 1 << 31, block):
        source = torch.arange(start, start + block, dtype=torch.int64).to(torch.int32).view(src)
        for dst in targets:
            assert_as_torch(paramkit.copy_(torch.empty(block, dtype=dst), source), source)


def test_any_byte_but_0_is_true(backend: str) -> None:
    """A bool made from other bytes, as torch reads it."""
    source = torch.tensor([0, 1, 2, 255] * 40, dtype=torch.uint8).view(torch.bool)
    for dst in (torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.float8_e4m3fn):
        got = paramkit.copy_(torch.empty(160, dtype=dst), source)
        assert torch.equal(got.float(), torch.tensor([0.0, 1, 1, 1] * 40))


PAIRS = (
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float8_e5m2, torch.float16),
    (torch.float64, torch.uint8),
    (torch.uint8, torch.float64),
    (torch.bool, torch.int64),
    (torch.float8_e8m0fnu, torch.int16),
)


@pytest.mark.parametrize(("dst", "src"), PAIRS, ids=str)
@pytest.mark.parametrize("streams", (False, True))
def test_every_length_and_place(
    backend: str, dst: torch.dtype, src: torch.dtype, streams: bool, stream_stores
) -> None:
    """Tails of every length, destinations at every phase of a cache line, nothing beside them written."""
    numbers = torch.randint(0, 2, (5000,)) * torch.randint(1, 9, (5000,))
    source = numbers.to(torch.float32).to(src)
    with stream_stores(streams):
        for count in (*range(0, 131, 7), 1, 2, 3, 511, 512, 513, 1029, 4099):
            offset = count % 61
            whole = place(Layout((count,), (1,), 64 + offset, count + 192), dst)
            seen = watch(whole)
            paramkit.copy_(whole, source[offset : offset + count])
            seen.assert_only_inside()
            assert_as_torch(whole.clone(), source[offset : offset + count])


@pytest.mark.parametrize(("dst", "src"), PAIRS, ids=str)
def test_layouts(backend: str, dst: torch.dtype, src: torch.dtype) -> None:
    def numbers(*shape: int) -> Tensor:
        return torch.randint(0, 8, shape).to(torch.float32).to(src)

    wanted = {
        "rows": (torch.zeros(40, 50).to(dst)[:, 3:20], numbers(40, 17)),
        "long rows": (torch.zeros(3, 9000).to(dst)[:, :8000], numbers(3, 8000)),
        "transpose": (torch.zeros(67, 130).to(dst), numbers(130, 67).t()),
        "general": (torch.zeros(30, 30).to(dst)[::3, ::2], numbers(20, 45)[::2, ::3]),
        "fill": (torch.zeros(33, 5).to(dst), numbers(1)[0]),
        "spread": (torch.zeros(9, 70).to(dst), numbers(9, 1)),
        "zip": (torch.zeros(5, 33, 2).to(dst), numbers(5, 2, 33).transpose(1, 2)),
        "unzip": (torch.zeros(5, 2, 33).to(dst), numbers(5, 33, 2).transpose(1, 2)),
    }
    for name, (got, source) in wanted.items():
        expected = got.clone().copy_(source)
        seen = watch(got)
        with paramkit.backend.trace() as trace:
            paramkit.copy_(got, source)
        assert backend == "native" or trace.casts == 1, name
        seen.assert_only_inside()
        assert torch.equal(bits(got), bits(expected)), name
