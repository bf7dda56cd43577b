"""Sharded safetensors into a model with tensor parallelism and FSDP2 at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import paramkit
from benchmarks.cases.models import filled

from .registry import Setting, Work, case

__all__: list[str] = []

# Blocks, features, files.
SIZES = {"full": (16, 2048, 8), "quick": (4, 1024, 4), "tiny": (2, 16, 2)}
ROWS = ("o", "down")
TP = {"q", "k", "v", "gate", "up", *ROWS}


class _Block(nn.Module):
    """The parameters of a transformer's block."""

    def __init__(self, features: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(features, features, bias=False))
        for name in ("gate", "up"):
            setattr(self, name, nn.Linear(features, 4 * features, bias=False))
        self.down = nn.Linear(4 * features, features, bias=False)
        self.norm = nn.RMSNorm(features)


def _model(blocks: int, features: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = nn.Sequential(*(_Block(features) for _ in range(blocks))).bfloat16()
    plan = {name: RowwiseParallel() if name in ROWS else ColwiseParallel() for name in TP}
    for block in model:
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model.to_empty(device="cpu")


def _write(folder: Path, shapes: Mapping[str, tuple[int, ...]], files: int) -> None:
    """A checkpoint of several files and an index, as large models come."""
    folder.mkdir(parents=True)
    tensors = filled(shapes, torch.bfloat16)
    names = list(tensors)
    where: dict[str, str] = {}
    for k in range(files):
        file = f"model-{k + 1:05}-of-{files:05}.safetensors"
        part = names[k * len(names) // files : (k + 1) * len(names) // files]
        save_file({name: tensors[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@case(
    "files into 2-D",
    "safetensors files of 2 GiB in the page cache, into tensor parallelism x FSDP2 on a 2 x 2 mesh; torch's "
    "side is load_file of all on every rank, distribute_tensor and copy_",
)
def _files(setting: Setting) -> Work:
    blocks, features, files = SIZES[setting.size]
    model = _model(blocks, features)
    parameters = dict(model.named_parameters())
    folder = setting.folder / "checkpoint"
    if dist.get_rank() == 0:
        _write(folder, {name: tuple(p.shape) for name, p in parameters.items()}, files)
    dist.barrier()
    parts = sorted(folder.glob("*.safetensors"))
    local = [p._local_tensor for p in parameters.values()]  # type: ignore[attr-defined]

    def ours() -> object:
        return paramkit.transplant(model, folder)

    def torchs(**options: object) -> None:
        for part in parts:
            for name, tensor in load_file(part).items():
                p = parameters[name]
                p.copy_(distribute_tensor(tensor, p.device_mesh, p.placements, **options))  # type: ignore

    def after(_: Mapping[str, float]) -> dict[str, float]:
        source = paramkit.open_source(folder, mmap=False)
        paramkit.transplant(model, source)
        opened = {id(t.file): t.file for t in source.values()}  # type: ignore[union-attr]
        read = sum(file.bytes_read for file in opened.values())
        share = sum(t.numel() * t.element_size() for t in local)
        return {"bytes read, of its share": read / share, "bytes read": read}

    return Work(
        {
            "paramkit": ours,
            "torch": torchs,
            "torch, without scatter": lambda: torchs(src_data_rank=None),
        },
        local,
        sum(p.numel() * p.element_size() for p in parameters.values()),
        after=after,
    )
