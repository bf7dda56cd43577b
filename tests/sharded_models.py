"""A small model of layers that rules rearrange, the checkpoint that it takes, and ways to shard it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from paramkit import Rule
from tests.guards import assert_same_bits, place, random_layout

__all__ = [
    "HOWS",
    "Net",
    "assert_same_shards",
    "checkpoint",
    "grid",
    "local_of",
    "rules",
    "sharded",
    "shards_of",
]

# FSDP2 on a mesh of one axis and of two, TP, both, and any placements, in memory of any strides.
HOWS = ("fsdp", "hsdp", "tp", "tp fsdp", "any 0", "any 1", "any 2")
GROUPS, HEADS, HEAD = 2, 2, 3  # query heads of a group, rows of a head


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, GROUPS * (HEADS + 2) * HEAD)
        self.out = nn.Linear(GROUPS * HEADS * HEAD, 6)
        self.gate_up = nn.Linear(6, 14, bias=False)
        self.down = nn.Linear(7, 6)
        self.experts = nn.Parameter(torch.empty(3, 5, 4))
        self.one = nn.Parameter(torch.empty(1, 5))


class Net(nn.Module):
    """Sizes that no number of ranks divides, a tied head, buffers; every element is 7."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 7.0)


def checkpoint() -> dict[str, Tensor]:
    """Other names, layouts and dtypes; fewer words than the model has."""
    made: dict[str, Tensor] = {}
    random_ = torch.Generator().manual_seed(5)

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random_).to(dtype)

    made["tok"] = rand(9, 6, dtype=torch.float16)
    for i in range(2):
        for name, heads in (("q", GROUPS * HEADS), ("k", GROUPS), ("v", GROUPS)):
            made[f"h.{i}.{name}.w"] = rand(heads * HEAD, 6)
            made[f"h.{i}.{name}.b"] = rand(heads * HEAD, dtype=torch.float64)
        made[f"h.{i}.o.w"] = rand(GROUPS * HEADS * HEAD, 6)
        made[f"h.{i}.o.b"] = rand(6, dtype=torch.bfloat16)
        made[f"h.{i}.gate"], made[f"h.{i}.up"] = rand(7, 6), rand(7, 6)
        made[f"h.{i}.down.w"], made[f"h.{i}.down.b"] = rand(7, 6, dtype=torch.bfloat16), rand(6)
        for e in range(3):
            made[f"h.{i}.x.{e}"] = rand(4, 5)
        made[f"h.{i}.one"] = rand(1, 5)
    made["ln.w"], made["ln.b"], made["scale"] = rand(6), rand(6), rand(3)
    return made


def rules(fill: Any = "zeros") -> list[Rule]:
    """From the checkpoint into the model."""
    sizes = {"g": GROUPS, "d": HEAD}
    found = [Rule("tok", "embed.weight", rows="overlap", fill=fill)]
    for end, axes in (("w", " e"), ("b", "")):
        to = f"layers.{{i}}.qkv.{'weight' if end == 'w' else 'bias'}"
        query, other = f"(g r d){axes} -> (g s d){axes}", f"(g d){axes} -> (g s d){axes}"
        found += [
            Rule(f"h.{{i}}.q.{end}", to, query, at={"s": "0:r"}, r=HEADS, **sizes),
            Rule(f"h.{{i}}.k.{end}", to, other, at={"s": HEADS}, **sizes),
            Rule(f"h.{{i}}.v.{end}", to, other, at={"s": HEADS + 1}, **sizes),
        ]
    return [
        *found,
        Rule("h.{i}.o.w", "layers.{i}.out.weight", "i o -> o i"),
        Rule("h.{i}.o.b", "layers.{i}.out.bias"),
        Rule("h.{i}.gate", "layers.{i}.gate_up.weight", "o i -> (s o) i", at={"s": 0}, s=2),
        Rule("h.{i}.up", "layers.{i}.gate_up.weight", "o i -> (s o) i", at={"s": 1}, s=2),
        Rule("h.{i}.down.w", "layers.{i}.down.weight", "i o -> o i"),
        Rule("h.{i}.down.b", "layers.{i}.down.bias"),
        Rule("h.{i}.x.{e}", "layers.{i}.experts", "i o -> e o i"),
        Rule("h.{i}.one", "layers.{i}.one"),
        Rule("ln.w", "norm.weight"),
        Rule("ln.b", "norm.bias"),
    ]


# ---- sharding ------------------------------------------------------------------------------------


def grid() -> DeviceMesh:
    """All ranks, on two axes."""
    world = dist.get_world_size()
    outer = 2 if world % 4 == 0 else 1
    return init_device_mesh("cpu", (outer, world // outer), mesh_dim_names=("dp", "tp"))


def sharded(model: Any, how: str) -> Any:
    """The model, sharded in place, with its values."""
    mesh = grid()
    if how.startswith("any"):
        return _anyhow(model, mesh, random.Random(how))
    if "tp" in how:
        plan = {
            "layers.*.qkv": ColwiseParallel(),
            "layers.*.out": RowwiseParallel(),
            "layers.*.gate_up": ColwiseParallel(),
            "layers.*.down": RowwiseParallel(),
        }
        parallelize_module(model, mesh["tp"], plan)
    if "fsdp" in how or how == "hsdp":
        inner = {"hsdp": mesh, "fsdp": None, "tp fsdp": mesh["dp"]}[how]
        for layer in model.layers:
            fully_shard(layer, mesh=inner)
        fully_shard(model, mesh=inner)
    return model


def _anyhow(model: nn.Module, mesh: DeviceMesh, rng: random.Random) -> nn.Module:
    """Each parameter with placements of its own, its shards with gaps and in any order of axes."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        new = made.get(id(parameter))
        if new is None:
            new = made[id(parameter)] = nn.Parameter(_placed(parameter.detach(), mesh, rng))
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, new)
    return model


def _placed(whole: Tensor, mesh: DeviceMesh, rng: random.Random) -> DTensor:
    choices: list[Any] = [Replicate(), *(Shard(k) for k in range(whole.dim()))]
    choices += [_StridedShard(k, split_factor=f) for k in range(whole.dim()) for f in (2, 3)]
    placements = [rng.choice(choices) for _ in range(mesh.ndim)]
    local, coordinate = whole, mesh.get_coordinate()
    assert coordinate is not None
    for k, placement in enumerate(placements):
        if not placement.is_replicate():
            parts, _ = placement._split_tensor(
                local, mesh.size(k), with_padding=False, contiguous=True
            )
            local = parts[coordinate[k]]
    # Another layout for every rank: nothing says that they are alike.
    layout = random_layout(random.Random(rng.random() + dist.get_rank()), local.shape)
    held = place(layout, whole.dtype).copy_(local)
    return DTensor.from_local(
        held, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


# ---- comparing -----------------------------------------------------------------------------------


def local_of(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shards_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, with this rank's shards for DTensors."""
    state: Iterable[tuple[str, Tensor]]
    state = model.state_dict().items() if isinstance(model, nn.Module) else model.items()
    return {name: local_of(tensor.detach()) for name, tensor in state}


def assert_same_shards(model: Any, expected: Any) -> None:
    """Bit for bit, on this rank."""
    got, wanted = shards_of(model), shards_of(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert_same_bits(tensor, wanted[name], what=name)
