"""Dense copies and fills of one float32 tensor, from 256 bytes to 256 MiB."""

from __future__ import annotations

import torch

from tests import cases as inputs

from ..targets import Condition
from .calls import copy, fill
from .registry import KIB, MIB, Work, case, group, targets

COPIES = group("contiguous copies", "Contiguous copies")
FILLS = group("contiguous fills", "Contiguous fills")

IN_CACHE = targets(1.0)
GUARDED = targets()
LARGE = targets(1.5, limit=0.95)

# `inner` keeps one sample near 100 us or more without making the large ones slow.
SIZES: tuple[tuple[str, int, int, tuple[Condition, ...]], ...] = (
    ("256 B", 256, 200, GUARDED),
    ("4 KiB", 4 * KIB, 100, IN_CACHE),
    ("16 KiB", 16 * KIB, 50, IN_CACHE),
    ("64 KiB", 64 * KIB, 20, IN_CACHE),
    ("256 KiB", 256 * KIB, 10, IN_CACHE),
    ("1 MiB", MIB, 4, IN_CACHE),
    ("4 MiB", 4 * MIB, 1, IN_CACHE),
    ("16 MiB", 16 * MIB, 1, IN_CACHE),
    ("32 MiB", 32 * MIB, 1, GUARDED),
    ("64 MiB", 64 * MIB, 1, GUARDED),
    ("128 MiB", 128 * MIB, 1, GUARDED),
    ("256 MiB", 256 * MIB, 1, LARGE),
)


def _elements(size: int, tiny: bool) -> int:
    return min(size, 4 * KIB if tiny else size) // 4


def _sized() -> None:
    for label, size, inner, held in SIZES:

        @case(f"copy {label}", COPIES, f"copy_ of one contiguous float32 tensor, {label}", held)
        def copy_sized(tiny: bool, size: int = size, inner: int = inner) -> Work:
            count = _elements(size, tiny)
            return copy(*inputs.contiguous(count, torch.float32, inputs.tiled), inner=inner)

    for label, size, inner, held in SIZES:

        @case(
            f"fill {label}",
            FILLS,
            f"fill_ of one contiguous float32 tensor, {label}",
            held,
            limit="fill",
        )
        def fill_sized(tiny: bool, size: int = size, inner: int = inner) -> Work:
            return fill(torch.zeros(_elements(size, tiny)), 0.5, inner)


_sized()
