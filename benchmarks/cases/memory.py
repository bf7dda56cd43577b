"""Temporary memory of CPU to CPU copies: none, whatever the layout and the dtypes.

Not timed: `benchmarks.memory` runs each in a process of its own and looks at its peak.
"""

from __future__ import annotations

import torch

from tests import cases as inputs

from ..targets import AtMost
from .calls import copy
from .permutes import permute_cast
from .registry import MIB, Work, case, group

MEMORY = group("memory", "Temporary memory of copies of 512 MiB and transplants of 1 GiB")
NONE = (AtMost("memory", 0),)


@case("memory cast", MEMORY, "float32 to bfloat16, contiguous", NONE, mode="memory")
def cast(tiny: bool) -> Work:
    count = 1000 if tiny else 512 * MIB // 6
    dst = torch.zeros(count, dtype=torch.bfloat16)
    return copy(dst, inputs.tiled((count,), torch.float32))


@case("memory permute", MEMORY, "(2, 0, 1) of float32", NONE, mode="memory")
def permute(tiny: bool) -> Work:
    shape = (4, 8, 16) if tiny else (32, 512, 4096)
    return copy(*inputs.permuted(shape, (2, 0, 1), torch.float32, inputs.tiled))


@case(
    "memory permute with a cast",
    MEMORY,
    "(2, 0, 1) of float32, to bfloat16 in the same pass",
    NONE,
    mode="memory",
)
def permute_with_cast(tiny: bool) -> Work:
    shape = (4, 8, 16) if tiny else (32, 684, 4096)
    return permute_cast(shape, (2, 0, 1), torch.float32, torch.bfloat16)
