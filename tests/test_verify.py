"""`verify`: one flipped bit anywhere is found, what lies beside a view does not matter, any NaN is any NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import paramkit

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.uint8, torch.uint8),
    (torch.complex128, torch.complex128),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float8_e4m3fn),
    (torch.float8_e5m2, torch.float16),
    (torch.int64, torch.int8),
    (torch.float32, torch.int32),
    (torch.bool, torch.float64),
]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    seeded = torch.Generator().manual_seed(7)
    return torch.randint(0, 90, shape, generator=seeded).to(torch.float32).to(dtype)


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Destinations of one shape: each a view of memory that is larger than it."""
    wide = (*shape[:-1], shape[-1] + 3)
    turned = tuple(reversed(shape))
    return {
        "contiguous": torch.zeros(shape, dtype=dtype),
        "rows": torch.zeros(wide, dtype=dtype)[..., 1 : 1 + shape[-1]],
        "transposed": torch.zeros(turned, dtype=dtype).permute(*reversed(range(len(shape)))),
        "elements": torch.zeros((*shape, 2), dtype=dtype)[..., 1],
    }


def flip(dst: Tensor, index: tuple[int, ...]) -> None:
    """Change the lowest bit of one element."""
    element = dst[index]
    bits = element.reshape(1).clone().view(torch.uint8)
    bits[0] ^= 1
    element.copy_(bits.view(dst.dtype)[0])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 7), (4, 33, 5), (130, 257)])
def test_one_bit(src: torch.dtype, dst: torch.dtype, shape: tuple[int, ...]) -> None:
    for name, destination in layouts(shape, dst).items():
        source = values(shape, src)
        plan = paramkit.plan([destination], [source])
        plan.apply()
        assert plan.verify() == [], name
        for index in ((0,) * len(shape), tuple(n // 2 for n in shape), tuple(n - 1 for n in shape)):
            kept = destination.clone()
            if dst == torch.bool:
                destination[index] = ~destination[index]
            else:
                flip(destination, index)
            assert plan.verify() == ["dsts[0]"], (name, index)
            destination.copy_(kept)
        assert plan.verify() == [], name


@pytest.mark.usefixtures("backend")
def test_what_lies_beside_a_view_does_not_matter() -> None:
    memory = torch.zeros(64, 40)
    plan = paramkit.plan([memory[1:-1, 3:30]], [torch.rand(62, 27)])
    plan.apply()
    memory[0] = memory[-1] = 5.0
    memory[:, :3] = memory[:, 30:] = 7.0
    assert plan.verify() == []


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("fill", [0.5, 3])
def test_fills(fill: float) -> None:
    dsts = [torch.zeros(3, 5, 7)[:, 1:4, 2:5], torch.zeros(100_003, dtype=torch.bfloat16)]
    plan = paramkit.plan(dsts, fill)
    plan.apply()
    assert plan.verify() == []
    dsts[1][-1] += 1
    assert plan.verify() == ["dsts[1]"]
    dsts[0][2, 2, 2] = 9
    assert plan.verify() == ["dsts[0]", "dsts[1]"]


@pytest.mark.usefixtures("backend")
def test_any_nan_is_any_nan_after_a_cast_and_no_nan_without() -> None:
    other = torch.tensor([0x7FC1], dtype=torch.int16).view(torch.bfloat16)
    for source in (torch.full((700,), float("nan")), torch.full((20, 35), float("nan")).t()):
        dst = torch.zeros(source.shape, dtype=torch.bfloat16)
        plan = paramkit.plan([dst], [source])
        plan.apply()
        dst.fill_(0).copy_(other.expand(source.shape))
        assert plan.verify() == []
        dst.view(-1)[-1] = 1
        assert plan.verify() == ["dsts[0]"]
    same = torch.full((9,), float("nan"), dtype=torch.bfloat16)
    dst = torch.zeros(9, dtype=torch.bfloat16)
    plan = paramkit.plan([dst], [same])
    plan.apply()
    dst[4:5].copy_(other)
    assert plan.verify() == ["dsts[0]"]


@pytest.mark.usefixtures("backend")
def test_many_small_and_one_large_on_several_threads() -> None:
    sizes = [*range(1, 700), 3_000_001, 0, 5]
    dsts = [torch.zeros(n, dtype=torch.bfloat16) for n in sizes]
    srcs = [values((n,), torch.bfloat16) for n in sizes]
    plan = paramkit.plan(dsts, srcs)
    plan.apply()
    assert plan.verify() == []
    wrong = [0, 350, 699, 701]
    for k in wrong:
        flip(dsts[k], (sizes[k] - 1,))
    assert plan.verify() == [f"dsts[{k}]" for k in wrong]


@pytest.mark.usefixtures("backend")
def test_random_views() -> None:
    seeded = torch.Generator().manual_seed(3)
    for _ in range(60):
        rank = int(torch.randint(1, 5, (1,), generator=seeded))
        shape = [int(n) for n in torch.randint(1, 12, (rank,), generator=seeded)]
        order = torch.randperm(rank, generator=seeded).tolist()
        src_order = torch.randperm(rank, generator=seeded).tolist()

        def laid(order: list[int], shape: list[int] = shape) -> Tensor:
            memory = torch.zeros([shape[k] + 1 for k in order])
            view = memory[tuple(slice(0, shape[k]) for k in order)]
            return view.permute([order.index(k) for k in range(len(shape))])

        dst, src = laid(order), laid(src_order)
        src.copy_(torch.rand(shape, generator=seeded))
        plan = paramkit.plan([dst], [src])
        plan.apply()
        assert plan.verify() == []
        index = tuple(int(torch.randint(0, n, (1,), generator=seeded)) for n in shape)
        flip(dst, index)
        assert plan.verify() == ["dsts[0]"], (shape, order, src_order, index)
