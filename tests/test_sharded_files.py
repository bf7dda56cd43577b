"""Files into sharded models: each rank reads its own bytes, and checkpoints of ranks go into other shardings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import paramkit
from paramkit import Rule, open_source
from tests import ranks
from tests.guards import assert_same_bits
from tests.sharded_models import Net, assert_same_shards, checkpoint, rules, sharded, shards_of

# ---- bytes ---------------------------------------------------------------------------------------

WIDE = 1024  # of a row four ranks have 1 KiB each in float32: no rank reads what lies between


class Big(nn.Module):
    """Every rank has an equal part of every parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDE, 2 * 4 * 8, bias=False)
        self.gate_up = nn.Linear(WIDE, 2 * 24, bias=False)
        self.down = nn.Linear(WIDE, 16, bias=False)
        self.experts = nn.Parameter(torch.zeros(4, 8, WIDE))


def big() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(2 * 2 * 8, WIDE),
        "k": torch.randn(2 * 8, WIDE),
        "v": torch.randn(2 * 8, WIDE),
        "gate": torch.randn(24, WIDE),
        "up": torch.randn(24, WIDE, dtype=torch.float64),
        "down": torch.randn(16, WIDE),
        **{f"x.{e}": torch.randn(8, WIDE) for e in range(4)},
    }


BIG = [
    Rule("q", "qkv.weight", "(g r d) e -> (g s d) e", at={"s": "0:r"}, g=2, r=2, d=8),
    Rule("k", "qkv.weight", "(g d) e -> (g s d) e", at={"s": 2}, g=2, d=8),
    Rule("v", "qkv.weight", "(g d) e -> (g s d) e", at={"s": 3}, g=2, d=8),
    Rule("gate", "gate_up.weight", "o i -> (s o) i", at={"s": 0}, s=2),
    Rule("up", "gate_up.weight", "o i -> (s o) i", at={"s": 1}, s=2),
    Rule("down", "down.weight"),
    Rule("x.{e}", "experts", "o i -> e o i"),
]


def cut(model: Any, how: str) -> Any:
    """Every parameter over all ranks."""
    if how == "fsdp":
        fully_shard(model)
        return model
    if how == "columns":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name, parameter in list(model.named_parameters()):
            owner, _, key = name.rpartition(".")
            new = distribute_tensor(parameter.detach(), mesh, [Shard(parameter.dim() - 1)])
            setattr(model.get_submodule(owner), key, nn.Parameter(new))
        return model
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"qkv": ColwiseParallel(), "gate_up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    model.experts = nn.Parameter(distribute_tensor(model.experts.detach(), mesh["tp"], [Shard(0)]))
    fully_shard(model, mesh=mesh["dp"])
    return model


def counted(rank: int, folder: str) -> dict[tuple[str, Any], int]:
    """Bytes that this rank read of all files."""
    whole = Big()
    paramkit.transplant(whole, big(), BIG)
    expected = {name: p.detach() for name, p in whole.named_parameters()}
    found = {}
    for how in ("fsdp", "columns", "tp fsdp"):
        for mmap, staging in ((False, None), (False, 1 << 14), (True, None)):
            source: dict[str, Any] = open_source(Path(folder), mmap=mmap)
            model = cut(Big(), how)
            paramkit.transplant(model, source, BIG, mmap=mmap, staging=staging)
            for name, parameter in model.named_parameters():
                assert_same_bits(parameter.full_tensor().detach(), expected[name], what=name)
            if not mmap:  # of what is mapped, the system reads pages
                files = {id(t.file): t.file for t in source.values()}
                assert len(files) == 2
                found[how, staging] = sum(file.bytes_read for file in files.values())
    return found


def test_together_the_ranks_read_a_folder_once(tmp_path: Path) -> None:
    tensors = big()
    first = {name: t for k, (name, t) in enumerate(tensors.items()) if k % 2}
    save_file(first, tmp_path / "a.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in first}, tmp_path / "b.safetensors")
    found = ranks.run(counted, 4, str(tmp_path))
    size = sum(t.nbytes for t in tensors.values())
    for case in found[0]:
        assert sum(read[case] for read in found) == size, case
    # Each its share: in float64 "up" has twice the bytes, and under FSDP it is with the last two ranks.
    assert all(read["columns", None] == size // 4 for read in found)


def small(rank: int, path: str) -> None:
    """Tensors of a few bytes, cast and turned: the right values, though gaps are read along."""
    for how in ("fsdp", "tp fsdp", "any 4"):
        for more in ({}, {"mmap": True}, {"staging": 4096}):
            model = sharded(Net(), how)
            plan = paramkit.plan(model, path, rules({"normal": 1.0}), **more)
            plan.apply()
            whole = Net()
            paramkit.transplant(whole, checkpoint(), rules({"normal": 1.0}))
            expected = sharded(whole, how)
            assert_same_shards(model, expected)
            assert plan.verify() == []
            # The same plan, the file as another source.
            for tensor in shards_of(model).values():
                tensor.zero_()
            plan.apply(path)
            assert plan.verify() == []
            assert_same_shards(model, expected)


def test_small_tensors_of_a_file(tmp_path: Path) -> None:
    save_file(checkpoint(), tmp_path / "small.safetensors")
    ranks.run(small, 4, str(tmp_path / "small.safetensors"))


# ---- checkpoints of ranks ------------------------------------------------------------------------


def saves(rank: int, folder: str) -> None:
    """The checkpoint in shards of every kind, and a model as FSDP2 and as TP has it."""
    mesh = init_device_mesh("cpu", (2,))
    choices = [[Shard(0)], [Replicate()], [Shard(1)]]
    state = {
        name: distribute_tensor(tensor, mesh, choices[k % min(3, tensor.dim() + 1)])
        for k, (name, tensor) in enumerate(checkpoint().items())
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state, "step": 3}, checkpoint_id=f"{folder}/renamed")
        for how in ("fsdp", "tp"):
            model = Net()
            paramkit.transplant(model, checkpoint(), rules())
            dcp.save(sharded(model, how).state_dict(), checkpoint_id=f"{folder}/{how}")


def loads(rank: int, folder: str) -> None:
    expected = Net()
    paramkit.transplant(expected, checkpoint(), rules())
    made = [
        Rule(f"model.{r.src}", r.dst, r.pattern, at=dict(r.at), **dict(r.axis_sizes))
        for r in rules()[1:]
    ]
    made += [
        Rule("model.tok", "embed.weight", rows="overlap", fill="zeros"),
        Rule("model.scale", "scale"),
    ]
    hows = ("fsdp", "tp", "tp fsdp", "hsdp", "any 5") if dist.get_world_size() > 1 else ("fsdp",)
    for how in hows:
        wanted = sharded(Net(), how)
        paramkit.load_state_dict(wanted, expected.state_dict())
        for saved, by in (("renamed", made), ("fsdp", []), ("tp", [])):
            model = sharded(Net(), how)
            paramkit.transplant(model, Path(folder, saved), by)
            assert_same_shards(model, wanted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(saves, 2, str(folder))
    return str(folder)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_checkpoints_of_two_ranks_into_any_sharding(saved: str, world: int) -> None:
    ranks.run(loads, world, saved)


def test_checkpoints_of_two_ranks_into_one_process(saved: str) -> None:
    expected, model = Net(), Net()
    paramkit.transplant(expected, checkpoint(), rules())
    for how in ("fsdp", "tp"):
        paramkit.transplant(model, Path(saved, how))
        assert_same_shards(model, expected)
