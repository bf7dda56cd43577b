"""A pair of every layout, for any two dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.gpu.storages import place, small_numbers
from tests.guards import Layout
from tests.test_casts import DTYPES

__all__ = ["dense", "layouts", "others"]


def others(dtype: torch.dtype) -> list[torch.dtype]:
    return [other for other in DTYPES if other != dtype]


def dense(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return place(Layout.dense(shape), dtype, device)


def layouts(
    dst: torch.dtype, src: torch.dtype, device: torch.device
) -> list[tuple[str, Tensor, Tensor]]:
    """(name, destination, source): the sources hold numbers that every dtype agrees on."""

    def to(*shape: int) -> Tensor:
        return dense(shape, dst, device)

    def numbers(*shape: int) -> Tensor:
        return small_numbers(dense(shape, src, device))

    return [
        ("rows", to(40, 50)[:, 3:20], numbers(40, 17)),
        ("long rows", to(3, 9000)[:, :8000], numbers(3, 8000)),
        ("transpose", to(67, 130), numbers(130, 67).t()),
        ("odd transpose", to(67, 133)[:, 1:132], numbers(131, 69)[:, 2:].t()),
        ("batched transpose", to(3, 40, 33), numbers(3, 33, 40).transpose(1, 2)),
        ("general", to(30, 30)[::3, ::2], numbers(20, 45)[::2, ::3]),
        ("fill", to(33, 5), numbers(3)[2]),
        ("long fill", to(9000)[1:], numbers(3)[2]),
        ("spread", to(9, 70), numbers(9, 1)),
        ("repeated rows", to(9, 70), numbers(70)),
        ("zip", to(5, 33, 2), numbers(5, 2, 33).transpose(1, 2)),
        ("unzip", to(5, 2, 33), numbers(5, 33, 2).transpose(1, 2)),
        ("one", to(1), numbers(1)),
        ("none", to(0, 3), numbers(0, 3)),
    ]
