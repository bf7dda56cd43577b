"""Every cast against torch's on the GPU: all values of 8 and 16 bits, edges and random bits of wider ones."""

from __future__ import annotations

import pytest
import torch

import paramkit
from tests.cases import random_bits
from tests.gpu.cast_layouts import dense, layouts, others
from tests.gpu.needs import need_gpu
from tests.gpu.storages import assert_as_torch, assert_same_storage, counted, raw, twin
from tests.test_casts import DTYPES, every_value

need_gpu()  # the same kernels on the host convert as the host does


@pytest.mark.parametrize("src", DTYPES, ids=str)
def test_every_value_of_every_cast(cuda: torch.device, src: torch.dtype) -> None:
    """Also what is out of range, and NaN to integers: whatever torch gives on this GPU."""
    source = every_value(src).flatten().to(cuda)
    for dst in others(src):
        got = dense(tuple(source.shape), dst, cuda)
        want = twin(got)
        want.copy_(source)
        with paramkit.backend.trace() as trace:
            paramkit.copy_(got, source)
        assert (trace.routes, trace.casts) == ({"copy": 1}, 1)
        assert_same_storage(got, want, f"{src} -> {dst}", any_nan=True)


@pytest.mark.parametrize("src", DTYPES, ids=str)
def test_every_value_through_every_kernel(cuda: torch.device, src: torch.dtype) -> None:
    """Short runs, strided elements, tiles, fills: the other places where elements are converted."""
    source = every_value(src).flatten()
    source = source[: source.numel() // 256 * 256].to(cuda)
    source = source.repeat(64) if source.numel() == 256 else source
    rows = source.numel() // 256
    strided = torch.empty((source.numel(), 3), dtype=src, device=cuda)[:, 1]
    strided.copy_(source)
    pairs = []
    for dst in others(src):
        n = source.numel()
        wide = (rows, 300)
        pairs += [
            ("rows", dense(wide, dst, cuda)[:, 5:261], source.view(rows, 256)),
            ("odd rows", dense(wide, dst, cuda)[:, 5:260], source.view(rows, 256)[:, 1:]),
            ("strided", dense((n,), dst, cuda), strided),
            ("to strided", dense((n, 3), dst, cuda)[:, 1], source),
            ("transposed", dense((256, rows), dst, cuda), source.view(rows, 256).t()),
            ("odd transpose", dense((255, rows + 5), dst, cuda)[:, 2 : 2 + rows], source.view(rows, 256)[:, 1:].t()),
            ("spread", dense((n, 3), dst, cuda), source[:, None]),
        ]  # fmt: skip
    assert_as_torch(pairs, "every value")


@pytest.mark.parametrize("src", DTYPES, ids=str)
def test_every_value_as_a_fill(cuda: torch.device, src: torch.dtype) -> None:
    """One element for a whole destination; 300 values of each dtype."""
    source = every_value(src).flatten()
    source = source[:: max(source.numel() // 300, 1)].to(cuda)
    for dst in others(src):
        got = dense((source.numel(), 21), dst, cuda)
        want = twin(got)
        for row, value in zip(want.unbind(), source.unbind(), strict=True):
            row.copy_(value)
        counts = counted(
            lambda got=got: paramkit.foreach_fill_(list(got.unbind()), list(source.unbind()))
        )
        assert counts["launches"] == 1
        assert_same_storage(got, want, f"{src} -> {dst}", any_nan=True)


@pytest.mark.parametrize("dst", DTYPES, ids=str)
def test_random_bits_of_every_cast(cuda: torch.device, dst: torch.dtype) -> None:
    """Every family, from sources of random bits: NaN payloads, subnormals, out of range."""
    for src in others(dst):
        pairs = layouts(dst, src, cuda)
        for seed, (_, _, source) in enumerate(pairs):
            whole = raw(source)
            whole.copy_(random_bits((whole.numel() // src.itemsize,), src, seed).view(torch.uint8))
        assert_as_torch(pairs, "random bits")
