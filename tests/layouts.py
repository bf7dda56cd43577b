"""Tensors as the ranks of a group hold them: in full, or as DTensors of many placements.

The local tensors lie inside patterned storages, so that a write beside them is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from tests.guards import Layout, bits, place

__all__ = ["LAYOUTS", "arrange", "assert_holds", "local_of", "sharded"]

# Of four ranks: a mesh as (shape, ranks), and the placements of its axes. None: plain tensors.
LAYOUTS: dict[str, Any] = {
    "plain": None,
    "first rank": None,
    "fsdp": ((4,), (0, 1, 2, 3), (Shard(0),)),
    "columns": ((4,), (3, 1, 0, 2), (Shard(1),)),
    "replicated": ((4,), (0, 1, 2, 3), (Replicate(),)),
    "hsdp": ((2, 2), (0, 1, 2, 3), (Replicate(), Shard(0))),
    "2-d": ((2, 2), (0, 1, 2, 3), (_StridedShard(0, split_factor=2), Shard(0))),
    "2-d both": ((2, 2), (0, 1, 2, 3), (Shard(1), Shard(0))),
    "subset": ((2,), (1, 2), (Shard(0),)),
    "three": ((3,), (3, 0, 1), (Shard(1),)),
}
_PLAIN = {"plain": (0, 1, 2, 3), "first rank": (0,)}


@lru_cache
def _mesh(shape: tuple[int, ...], ranks: tuple[int, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(ranks).view(shape))


def _placements(placements: tuple[Any, ...], tensor: Tensor) -> list[Any]:
    """Those that a tensor can have: what has no such axis is replicated."""
    return [
        Replicate() if isinstance(p, Shard | _StridedShard) and p.dim >= tensor.ndim else p
        for p in placements
    ]


def arrange(
    kind: str, tensors: Mapping[str, Tensor], rank: int, fresh: bool = False
) -> dict[str, Any] | None:
    """What a rank holds of tensors, None where it holds nothing. Sends nothing.

    Args:
        kind: of `LAYOUTS`.
        tensors: in full.
        rank: of the default group.
        fresh: with pattern bytes as values.
    """
    layout = LAYOUTS[kind]
    if layout is None:
        if rank not in _PLAIN[kind]:
            return None
        return {name: guarded(t, fresh) for name, t in tensors.items()}
    shape, ranks, placements = layout
    mesh = _mesh(shape, ranks)
    if rank not in ranks:
        return None
    out: dict[str, Any] = {}
    for name, t in tensors.items():
        own = _placements(placements, t)
        local = distribute_tensor(t, mesh, own, src_data_rank=None).to_local()
        out[name] = DTensor.from_local(
            guarded(local, fresh), mesh, own, run_check=False, shape=t.shape, stride=t.stride()
        )
    return out


def guarded(values: Tensor, fresh: bool = False) -> Tensor:
    """A copy inside a patterned storage; with `fresh` the values are the pattern."""
    made = place(Layout.dense(values.shape), values.dtype)
    if not fresh:
        made.copy_(values)
    return made


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def assert_holds(
    held: Mapping[str, Any] | nn.Module | None, full: Mapping[str, Tensor], what: str = ""
) -> None:
    """Every local tensor has the bits of its part of the whole. Sends nothing."""
    if held is None:
        return
    if isinstance(held, nn.Module):
        held = held.state_dict()
    assert held, what
    for name, tensor in held.items():
        want = full[name]
        if isinstance(tensor, DTensor):
            want = distribute_tensor(
                want, tensor.device_mesh, tensor.placements, src_data_rank=None
            ).to_local()
        got = local_of(tensor)
        assert (got.dtype, got.shape) == (want.dtype, want.shape), f"{what}: {name}"
        assert torch.equal(bits(got), bits(want)), f"{what}: {name} differs: {got} {want}"


def sharded(model: nn.Module, kind: str, ranks: tuple[int, ...]) -> nn.Module:
    """A module of `Sequential`s of `Linear`s, sharded in place by torch's own means.

    Args:
        model: its linear layers are sharded by columns and rows in turn.
        kind: "fsdp", "hsdp", "tp", "2-d".
        ranks: four for hsdp and 2-d. All ranks call this, as they make the mesh together.
    """
    if kind in ("hsdp", "2-d"):
        mesh = DeviceMesh("cpu", torch.tensor(ranks).view(2, -1), mesh_dim_names=("a", "b"))
    else:
        mesh = DeviceMesh("cpu", list(ranks), mesh_dim_names=("a",))
    if dist.get_rank() not in ranks:
        return model
    if kind in ("tp", "2-d"):
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        styles = {
            n: RowwiseParallel() if k % 2 else ColwiseParallel() for k, n in enumerate(linears)
        }
        parallelize_module(model, mesh["b"] if kind == "2-d" else mesh, styles)  # type: ignore[arg-type]
    if kind != "tp":
        for child in model.children():
            if isinstance(child, nn.Sequential):
                fully_shard(child, mesh=mesh["a"] if kind == "2-d" else mesh)
        fully_shard(model, mesh=mesh["a"] if kind == "2-d" else mesh)
    return model
