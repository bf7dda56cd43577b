"""From Shard(0) to Shard(1): DTensors of one placement into those of another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import paramkit.distributed as pkd
from benchmarks.cases.models import filled

from .registry import Setting, Work, case

__all__: list[str] = []

# Tensors, features of each.
SMALL = {"full": (4000, 64), "quick": (400, 64), "tiny": (5, 8)}
MEDIUM = {"full": (64, 1024), "quick": (16, 512), "tiny": (3, 16)}
LARGE = {"full": (4, 4096), "quick": (2, 2048), "tiny": (2, 32)}


def _work(count: int, features: int) -> Work:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shape = (features, features)

    def sharded(tensor: Tensor, axis: int) -> DTensor:
        return distribute_tensor(tensor, mesh, [Shard(axis)], src_data_rank=None)

    values = filled({f"w{k}": shape for k in range(count)}, torch.float32)
    source = {name: sharded(values[name], 0) for name in values}
    # Clones: what distribute_tensor gives may be a view of all of it.
    source = {
        name: DTensor.from_local(t._local_tensor.clone(), mesh, [Shard(0)])
        for name, t in source.items()
    }
    model = {
        name: DTensor.from_local(torch.zeros(features, features // mesh.size()), mesh, [Shard(1)])
        for name in values
    }
    del values
    pairs = [(model[name], source[name]) for name in source]
    ready = pkd.plan(model, source)

    def torchs() -> None:
        for _, src in pairs:
            src.redistribute(mesh, [Shard(1)])

    def copied() -> None:
        for dst, src in pairs:
            dst.copy_(src.redistribute(mesh, [Shard(1)]))

    return Work(
        {
            "paramkit": ready.apply,
            "torch": torchs,
            "paramkit, planned anew": lambda: pkd.transplant(model, source),
            "torch, and copy_": copied,
        },
        [t._local_tensor for t in model.values()],
        sum(t.numel() * t.element_size() for t in model.values()),
        checked={"torch": copied},
    )


@case(
    "reshard small",
    "4,000 tensors of 16 KiB from Shard(0) to Shard(1), a plan that is ready; torch's side is redistribute",
    20,
)
def _small(setting: Setting) -> Work:
    return _work(*SMALL[setting.size])


@case("reshard medium", "64 tensors of 4 MiB, the same", 20)
def _medium(setting: Setting) -> Work:
    return _work(*MEDIUM[setting.size])


@case("reshard large", "4 tensors of 64 MiB, the same", 20)
def _large(setting: Setting) -> Work:
    return _work(*LARGE[setting.size])
