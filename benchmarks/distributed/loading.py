"""A full state dict on rank 0, into a model under FSDP2 on all ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import paramkit.distributed as pkd
from benchmarks.cases.models import filled, small

from .memory import peaks
from .registry import Setting, Work, case

__all__: list[str] = []

# Blocks, layers of a block (each a weight and, if small, a bias), features.
SMALL = {"full": (100, 100, 32), "quick": (20, 50, 32), "tiny": (3, 4, 8)}
LARGE = {"full": (32, 1, 4096), "quick": (8, 1, 2048), "tiny": (2, 1, 64)}


def _model(blocks: int, layers: int, features: int, bias: bool) -> nn.Module:
    """Blocks of linear layers, each block a group of FSDP2's. Shards have memory, and no values yet."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    with torch.device("meta"):
        model = nn.Sequential(
            *(
                nn.Sequential(*(nn.Linear(features, features, bias=bias) for _ in range(layers)))
                for _ in range(blocks)
            )
        )
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cpu")


def _work(model: nn.Module, full: dict[str, torch.Tensor], many: bool) -> Work:
    source = full or None
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

    def ours() -> object:
        return pkd.transplant(model, source, src=0)

    def torchs() -> object:
        # A copy: it puts the model's own tensors into the dict that it is given.
        return set_model_state_dict(model, dict(full), options=options)

    ready = pkd.plan(model, source, src=0)
    found = re.search(r"staging: ([\d,]+) bytes", ready.explain())
    staging = int(found[1].replace(",", "")) if found else 0
    sides = {"paramkit": ours, "torch": torchs, "paramkit, replay": ready.apply}
    calls = {"paramkit": ours, "torch": torchs}

    def after(_: Mapping[str, float]) -> dict[str, float]:
        return {"staging": staging, **({} if many else peaks(calls))}

    parameters = list(model.parameters())
    return Work(
        sides,
        [p._local_tensor for p in parameters],  # type: ignore[attr-defined]
        sum(p.numel() * p.element_size() for p in parameters),
        after=after,
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@case(
    "small from rank 0",
    "20,000 small parameters under FSDP2, from a full state dict on rank 0; torch's side is "
    "set_model_state_dict(full_state_dict=True, broadcast_from_rank0=True)",
)
def _small(setting: Setting) -> Work:
    model = _model(*SMALL[setting.size], bias=True)
    first = torch.distributed.get_rank() == 0
    return _work(model, small(_shapes(model), torch.float32) if first else {}, True)


@case("large from rank 0", "2 GiB of large parameters, the same way")
def _large(setting: Setting) -> Work:
    model = _model(*LARGE[setting.size], bias=False)
    first = torch.distributed.get_rank() == 0
    return _work(model, filled(_shapes(model), torch.float32) if first else {}, False)
