"""Between host and device memory: a large tensor with a conversion, and many small ones.

Host memory is pageable, as `torch.load` and `torch.empty` give it. The limit is a transfer from or to
pinned memory; what counts are the bytes that have to cross the bus, in the narrower dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

import paramkit

from .. import calls, inputs
from ..device import GIB, MIB, Device, host_memory
from ..registry import Work, case, group, targets

LARGE = group("transfers", "Between pageable host memory and the device, one tensor")
SMALL = group("small transfers", "The same, 20,000 tensors of 1024 bfloat16")

BF16, F32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")

TO, FROM = "to_device", "to_host"


Side = tuple[torch.dtype, torch.device]


def _large(size: int, tiny: bool, dst: Side, src: Side) -> Work:
    """So many bytes of float32 on the host."""
    # With the copy that the check makes, and what torch converts, it must fit the host.
    size = 40_000 if tiny else size if host_memory() > 5 * size else size // 4
    count = size // 4
    source = inputs.numbers((count,), *src)
    target = inputs.zeros((count,), *dst)
    return Work(
        ours=lambda: paramkit.copy_(target, source),
        peer=lambda: target.copy_(source),
        dsts=[target],
        bytes=count * min(source.element_size(), target.element_size()),
        keep=[source],
        facts={"elements": count},
    )


@case(
    "host float32->bfloat16 8 GiB",
    LARGE,
    "copy_ of 8 GiB of float32 in pageable host memory into bfloat16 on the device",
    targets(3, limit=0.9),
    clock="wall",
    limit=TO,
    launches=None,
    staged=True,
    seconds=8.0,
    least=3,
    quick=False,
)
def to_device(tiny: bool, gpu: Device) -> Work:
    return _large(8 * GIB, tiny, (BF16, gpu.where), (F32, CPU))


@case(
    "bfloat16->host float32 8 GiB",
    LARGE,
    "the reverse: bfloat16 on the device into 8 GiB of float32 in pageable host memory",
    targets(),
    clock="wall",
    limit=FROM,
    launches=None,
    staged=True,
    seconds=6.0,
    least=3,
    quick=False,
)
def to_host(tiny: bool, gpu: Device) -> Work:
    return _large(8 * GIB, tiny, (F32, CPU), (BF16, gpu.where))


@case(
    "host->device 512 MiB",
    LARGE,
    "copy_ of 512 MiB of float32 in pageable host memory, no conversion",
    targets(),
    clock="wall",
    limit=TO,
    launches=None,
    staged=True,
)
def same_dtype(tiny: bool, gpu: Device) -> Work:
    return _large(512 * MIB, tiny, (F32, gpu.where), (F32, CPU))


def _small(tiny: bool, dst: torch.device, src: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    count, numel = (20, 32) if tiny else (20_000, 1024)
    dsts = [inputs.zeros((numel,), BF16, dst) for _ in range(count)]
    return dsts, inputs.apart(count, numel, BF16, src)


def _listed(dsts: list[Tensor], srcs: list[Tensor]) -> Work:
    work = calls.lists(dsts, srcs)
    work.peer = work.others.pop("loop")
    work.others = {"_foreach_copy_": lambda: torch._foreach_copy_(dsts, srcs)}
    work.bytes //= 2  # each crosses the bus once
    return work


@case(
    "foreach_copy 20000 host->device",
    SMALL,
    "foreach_copy_ of 20,000 small CPU tensors, against a loop of copy_",
    targets(10),
    clock="wall",
    peer="loop of copy_",
    limit=TO,
    launches=None,
    staged=True,
    seconds=4.0,
    least=5,
)
def small_to_device(tiny: bool, gpu: Device) -> Work:
    return _listed(*_small(tiny, gpu.where, CPU))


@case(
    "foreach_copy 20000 device->host",
    SMALL,
    "the reverse",
    targets(),
    clock="wall",
    peer="loop of copy_",
    limit=FROM,
    launches=None,
    staged=True,
    seconds=3.0,
    least=5,
    quick=False,
)
def small_to_host(tiny: bool, gpu: Device) -> Work:
    return _listed(*_small(tiny, CPU, gpu.where))
