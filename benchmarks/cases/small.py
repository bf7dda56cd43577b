"""Many small tensors in one call: the price of a tensor, not of its bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import plain
from tests import cases as inputs
from tests import mixture

from .calls import lists
from .registry import KIB, Work, case, group, moved, targets

SMALL = group("small", "Many small tensors")
MIXED = group("lists", "Lists of mixed and medium tensors")


def _replay(dsts: list[Tensor], srcs: list[Tensor]) -> Work:
    import paramkit

    return Work(
        ours=paramkit.plan(dsts, srcs).apply,
        peer=lambda: torch._foreach_copy_(dsts, srcs),
        dsts=dsts,
        bytes=moved(dsts, srcs),
        keep=[srcs],
    )


def _with_floor(work: Work, srcs: list[Tensor]) -> Work:
    """Beside the least that such a list costs: dense pairs of one size, ready, in a plain C loop."""
    size = srcs[0].numel() * srcs[0].element_size()
    work.pairs = plain.Pairs(work.dsts, srcs, runs=1, run=size)
    return work


def _thousand(tiny: bool) -> tuple[list[Tensor], list[Tensor]]:
    return inputs.small_tensors(10 if tiny else 1000, 64)


@case("foreach_copy 1000x64", SMALL, "foreach_copy_ of 1000 x 64 float32, eager", targets(9))
def foreach_copy_small(tiny: bool) -> Work:
    dsts, srcs = _thousand(tiny)
    return _with_floor(lists(dsts, srcs), srcs)


@case("replay 1000x64 hot", SMALL, "the same, each side alone in a loop", targets(45), mode="hot")
@case("replay 1000x64", SMALL, "plan(dsts, srcs).apply() against torch._foreach_copy_", targets(22))
def replay_small(tiny: bool) -> Work:
    dsts, srcs = _thousand(tiny)
    return _with_floor(_replay(dsts, srcs), srcs)


# A model and its copy are at most 100 MB together; benchmarks --sizes prints the table.


def _experts(tiny: bool) -> tuple[list[Tensor], list[Tensor]]:
    return mixture.make(1000 if tiny else 1)


def _named(work: Work) -> Work:
    work.facts["tensors"] = len(work.dsts)
    work.facts["sizes"] = [
        {"parameter": line.name, "shape": list(line.shape), "tensors": line.count}
        for line in mixture.TABLE
    ]
    return work


@case(
    "foreach_copy experts",
    SMALL,
    "foreach_copy_ of the 31,337 bfloat16 tensors of a mixture of experts, eager",
    targets(3),
)
def foreach_copy_experts(tiny: bool) -> Work:
    return _named(lists(*_experts(tiny)))


@case(
    "replay experts", SMALL, "the same, plan(...).apply() against torch._foreach_copy_", targets(6)
)
def replay_experts(tiny: bool) -> Work:
    return _named(_replay(*_experts(tiny)))


@case(
    "foreach_copy mixed",
    MIXED,
    "foreach_copy_, 500 x 256: float32 -> bfloat16 and same-dtype pairs",
    targets(),
)
def foreach_copy_mixed(tiny: bool) -> Work:
    count = 5 if tiny else 250
    cast = inputs.small_tensors(count, 256, torch.bfloat16, torch.float32)
    same = inputs.small_tensors(count, 256, torch.float32)
    dsts = [dst for pair in zip(cast[0], same[0], strict=True) for dst in pair]
    srcs = [src for pair in zip(cast[1], same[1], strict=True) for src in pair]
    return lists(dsts, srcs)


@case(
    "foreach_copy casts",
    MIXED,
    "foreach_copy_, 200 x 4096, every pair float32 -> bfloat16",
    targets(),
)
def foreach_copy_casts(tiny: bool) -> Work:
    return lists(*inputs.small_tensors(3 if tiny else 200, 4096, torch.bfloat16, torch.float32))


@case(
    "foreach_copy 200x64KiB",
    MIXED,
    "foreach_copy_, 200 contiguous float32 tensors of 64 KiB",
    targets(),
)
def foreach_copy_medium(tiny: bool) -> Work:
    return lists(*inputs.small_tensors(3 if tiny else 200, 16 * KIB))
