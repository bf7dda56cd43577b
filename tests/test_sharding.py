"""Which indices a rank holds: what torch's own local tensors of whole numbers say."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from paramkit.sharding import (
    axes_at,
    axes_by_rank,
    place_of,
    split_of,
    spread_finding,
    spread_of,
    unsharded_finding,
)
from paramkit.sources.spread import Segment
from tests import ranks

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Each element its own address."""
    return torch.arange(prod(shape)).view(shape)


def expected(axes: tuple[tuple[Segment, ...], ...], whole: Tensor) -> Tensor:
    """What axes say that a rank holds; its own indices must have no gap."""
    for axis, segments in enumerate(axes):
        at = 0
        for s in segments:
            assert s.length > 0 and s.at == at
            at += s.length
        index = [i for s in segments for i in range(s.start, s.start + s.length)]
        whole = whole.index_select(axis, torch.tensor(index, dtype=torch.int64))
    return whole


def check(tensors: list[DTensor]) -> int:
    """A rank's axes are those of its local tensors, and all ranks know those of all."""
    own: list[Any] = []
    for tensor in tensors:
        place, local = place_of(tensor), tensor.to_local()
        said = (tensor.placements, tensor.shape, local.shape, place.axes)
        assert place.axes is not None
        held = expected(place.axes, numbered(tuple(tensor.shape)))
        if local.numel():
            assert torch.equal(held, local) and place.shape == tuple(local.shape), said
        else:
            assert not held.numel() and 0 in place.shape, said
        spread = spread_of(tensor)
        assert spread_finding("w", spread, True) is None, said
        (part,) = spread.parts
        assert part.held is tensor._local_tensor and part.axes == place.axes
        own.append(place.axes)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for k, tensor in enumerate(tensors):
        mesh = tensor.device_mesh.mesh.flatten().tolist()
        assert axes_by_rank(tensor) == {rank: everyone[rank][k] for rank in mesh}
    return len(tensors)


# ---- as torch distributes a tensor ---------------------------------------------------------------


PLACEMENTS: list[Any] = [Replicate(), Shard(0), Shard(1)]


def distributed(rank: int, *shape: int) -> int:
    """Every placement of many shapes on a mesh."""
    mesh = init_device_mesh("cpu", shape)
    made = []
    for a, placements in product(SIZES, product(PLACEMENTS, repeat=mesh.ndim)):
        whole = numbered((a, 3) if a % 2 else (5, a))
        made.append(distribute_tensor(whole, mesh, placements, src_data_rank=None))
    for a in SIZES:  # one axis alone, several times
        made.append(distribute_tensor(numbered((a,)), mesh, [Shard(0)] * mesh.ndim))
    made.append(distribute_tensor(numbered(()), mesh, [Replicate()] * mesh.ndim))
    return check(made)


@pytest.mark.parametrize("mesh", [(2,), (4,), (2, 2)], ids=str)
def test_as_torch_distributes(mesh: tuple[int, ...]) -> None:
    count = len(SIZES) * (3 ** len(mesh) + 1) + 1
    assert ranks.run(distributed, prod(mesh), *mesh) == [count] * prod(mesh)


# ---- _StridedShard -------------------------------------------------------------------------------


def strided(rank: int, *shape: int) -> int:
    """torch cuts each axis of the mesh from what the ones before left."""
    mesh = init_device_mesh("cpu", shape)
    coordinate = mesh.get_coordinate()
    one: list[Any] = [Replicate(), Shard(0)]
    one += [_StridedShard(0, split_factor=f) for f in (1, 2, 3, 4)]
    tensors = []
    for a, placements in product(SIZES, product(one, repeat=mesh.ndim)):
        local = numbered((a, 2))
        for k, placement in enumerate(placements):
            if not placement.is_replicate():
                shards, _ = placement._split_tensor(
                    local, mesh.size(k), with_padding=False, contiguous=True
                )
                local = shards[coordinate[k]]
        made = DTensor.from_local(
            local.clone(),
            mesh,
            placements,
            run_check=False,
            shape=torch.Size((a, 2)),
            stride=(2, 1),
        )
        tensors.append(made)
    return check(tensors)


@pytest.mark.parametrize("mesh", [(2,), (4,), (2, 2)], ids=str)
def test_strided_shards(mesh: tuple[int, ...]) -> None:
    count = len(SIZES) * 6 ** len(mesh)
    assert ranks.run(strided, prod(mesh), *mesh) == [count] * prod(mesh)


# ---- as torch shards modules ---------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, n), nn.Linear(n, 5)
        for parameter in self.parameters():
            parameter.data = numbered(tuple(parameter.shape)).float()


def modules(rank: int, how: str) -> set[str]:
    """FSDP2, TP and both, of sizes that divide by nothing."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensors: list[Any] = []
    for n in (1, 2, 3, 7, 8, 13):
        block = Block(n)
        if "tp" in how:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
        if how == "hsdp":
            fully_shard(block, mesh=mesh)
        elif "fsdp" in how:
            try:
                fully_shard(block, mesh=mesh["dp"] if "tp" in how else None)
            except NotImplementedError:  # torch does not shard this one unevenly
                continue
        tensors += block.parameters()
    check([tensor for tensor in tensors if isinstance(tensor, DTensor)])
    return {type(p).__name__ for tensor in tensors for p in getattr(tensor, "placements", ())}


@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        ("fsdp", {"Shard"}),
        ("hsdp", {"Replicate", "Shard"}),
        ("tp", {"Replicate", "Shard"}),
        ("tp fsdp", {"Replicate", "Shard", "_StridedShard"}),
    ],
)
def test_as_torch_shards_modules(how: str, kinds: set[str]) -> None:
    for seen in ranks.run(modules, 4, how):
        assert seen - {"Replicate"} == kinds - {"Replicate"}


# ---- without a group -----------------------------------------------------------------------------


def test_together_the_ranks_have_every_index_once() -> None:
    for n, size, factor in product(range(20), (1, 2, 3, 4, 7), (1, 2, 3, 5)):
        for inner in (1, 2, 3):
            held: Counter[int] = Counter()
            for coordinate in product(range(size), range(inner)):
                (axis,) = axes_at((n,), (size, inner), coordinate, ((0, factor), (0, 1)))
                held.update(i for s in axis for i in range(s.start, s.start + s.length))
            assert held == Counter(range(n))


def test_a_placement_without_values_has_no_place() -> None:
    assert split_of(Replicate()) is None and split_of(Shard(1)) == (1, 1)
    assert split_of(_StridedShard(2, split_factor=4)) == (2, 4)
    with pytest.raises(ValueError):
        split_of(Partial())


def gathered(rank: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert unsharded_finding(model) is None
    fully_shard(model[1], reshard_after_forward=False)
    fully_shard(model)
    assert unsharded_finding(model) is None
    model(torch.zeros(2, 4))
    finding = unsharded_finding(model)
    assert finding is not None and "reshard()" in finding.hint
    for module in (model, model[1]):
        module.reshard()
    assert unsharded_finding(model) is None
    model[1].unshard()
    finding = unsharded_finding(model)
    assert finding is not None and finding.name == "1"


def test_gathered_modules_are_seen() -> None:
    ranks.run(gathered, 2)


def elsewhere(rank: int) -> None:
    """A mesh that this rank is not part of."""
    mesh = DeviceMesh("cpu", [1])
    whole = numbered((4, 2))
    tensor = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    spread = spread_of(tensor)
    assert len(spread.parts) == (rank == 1)
    assert axes_by_rank(tensor) == {1: axes_at((4, 2), (1,), (0,), ((0, 1),))}


def test_a_rank_outside_of_the_mesh_holds_nothing() -> None:
    ranks.run(elsewhere, 2)
