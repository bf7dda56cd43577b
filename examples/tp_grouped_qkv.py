"""A tensor-parallel model whose fused, grouped QKV weight is filled from separate q, k and v.

    torchrun --nproc-per-node 4 examples/tp_grouped_qkv.py

The fused weight has, for each head of keys and values, the query heads that share it, then the key, then the
value: rows "(kv s d)" with s = GROUP + 2. Tensor parallelism cuts these rows wherever the number of ranks says,
here even through the middle of a head. The rules know nothing of it; each rank reads exactly the rows of q, k
and v that its shard is made of.
"""

import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import paramkit
import paramkit.distributed as pkd
from paramkit import Rule

LAYERS, DIM, KV_HEADS, GROUP, HEAD = 2, 128, 3, 4, 8
HEADS = KV_HEADS * GROUP

OLD, QKV = "layers.{i}.self_attn", "layers.{i}.qkv.weight"
SIZES = {"kv": KV_HEADS, "d": HEAD, "s": GROUP + 2}
QUERIES, ONE = "(kv g d) e -> (kv s d) e", "(kv d) e -> (kv s d) e"
RULES = [
    Rule(OLD + ".q_proj.weight", QKV, QUERIES, at={"s": f"0:{GROUP}"}, g=GROUP, **SIZES),
    Rule(OLD + ".k_proj.weight", QKV, ONE, at={"s": GROUP}, **SIZES),
    Rule(OLD + ".v_proj.weight", QKV, ONE, at={"s": GROUP + 1}, **SIZES),
    Rule(OLD + ".o_proj.weight", "layers.{i}.out.weight"),
]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD, bias=False)
        self.out = nn.Linear(HEADS * HEAD, DIM, bias=False)


def make_model():
    return nn.ModuleDict({"layers": nn.ModuleList(Attention() for _ in range(LAYERS))})


def write_checkpoint(path):
    tensors = {}
    for i in range(LAYERS):
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"layers.{i}.self_attn.{name}_proj.weight"] = torch.randn(heads * HEAD, DIM)
        tensors[f"layers.{i}.self_attn.o_proj.weight"] = torch.randn(DIM, HEADS * HEAD)
    save_file(tensors, path)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    where = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(where)
    path = Path(where[0], "model.safetensors")
    if rank == 0:
        write_checkpoint(path)
    dist.barrier()

    mesh = init_device_mesh("cpu", (world,))
    model = make_model()
    plan = {"qkv": ColwiseParallel(), "out": RowwiseParallel()}
    for layer in model["layers"]:
        parallelize_module(layer, mesh, plan, src_data_rank=None)  # None: cut here, nothing is sent

    # A path on every rank: each reads its part. What fails on one rank fails on all, with one message.
    pkd.transplant(model, path, RULES)

    # The check: the same rules into the whole model, in one process, cut by torch afterwards.
    whole = make_model()
    paramkit.transplant(whole, path, RULES)
    differ = []
    for name, p in model.named_parameters():
        full = whole.get_parameter(name)
        wanted = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
        if not torch.equal(p.to_local(), wanted.to_local()):
            differ.append(name)
    rows = model["layers"][0].qkv.weight.to_local().shape[0]
    said = [None] * world
    dist.all_gather_object(said, (rows, differ))
    if rank == 0:
        print(f"qkv: {HEADS} query heads in groups of {GROUP}, {KV_HEADS} keys, {KV_HEADS} values")
        for r, (rows, differ) in enumerate(said):
            print(
                f"rank {r}: {rows} rows of qkv, {rows / HEAD} heads; different: {differ or 'nothing'}"
            )
        assert not any(differ for _, differ in said)
        print("checked: every shard has the bits of the single-process transplant")
        shutil.rmtree(where[0])
    time.sleep(0.2)  # until gloo has let go of tensors: pytorch/pytorch#179291
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
