"""An FSDP2 model, filled from a sharded safetensors checkpoint that has other names.

    torchrun --nproc-per-node 4 examples/fsdp2_from_safetensors.py

Every rank reads the bytes of its own shards and nothing else. No rank ever has the whole model in memory, and
nothing is sent. For checkpoints on a disk that all ranks see.
"""

import json
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import paramkit
from paramkit import Rule

DIM, LAYERS, VOCAB = 256, 4, 4096

# The checkpoint has the names of Llama; the model below has its own.
RULES = [
    Rule("model.embed_tokens.weight", "embed.weight"),
    Rule("model.layers.{i}.mlp.{part}_proj.weight", "blocks.{i}.{part}.weight"),
    Rule("lm_head.weight", "head.weight"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(DIM, 4 * DIM, bias=False)
        self.down = nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens):
        return self.head(self.blocks(self.embed(tokens)))


def write_checkpoint(folder):
    """Two files and an index, as large checkpoints are published."""
    ends = {n: torch.randn(VOCAB, DIM) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    middle = {}
    for i in range(LAYERS):
        middle[f"model.layers.{i}.mlp.up_proj.weight"] = torch.randn(4 * DIM, DIM)
        middle[f"model.layers.{i}.mlp.down_proj.weight"] = torch.randn(DIM, 4 * DIM)
    index = {}
    for number, tensors in enumerate((ends, middle), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(tensors, folder / file)
        index.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def progress_bar(rank):
    """On rank 0 alone, and if rich is installed: four bars would write over each other."""
    try:
        from rich.progress import Progress
    except ModuleNotFoundError:
        return nullcontext(None)
    return Progress() if rank == 0 else nullcontext(None)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    where = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(where)
    folder = Path(where[0])
    if rank == 0:
        write_checkpoint(folder)
    dist.barrier()

    with torch.device("meta"):  # no memory for values that would be overwritten anyway
        model = Model().bfloat16()  # the checkpoint is float32: converted on the way
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")  # memory for the shards of this rank

    # `paramkit.transplant(model, folder, RULES)` would do. Opened here, to see afterwards what was read.
    tensors = paramkit.open_source(folder, mmap=False)
    with progress_bar(rank) as bar:
        task = bar and bar.add_task("loading")
        report = paramkit.transplant(
            model,
            tensors,
            RULES,
            progress=bar and (lambda done, total: bar.update(task, completed=done, total=total)),
        )

    files = {id(tensor.file): tensor.file for tensor in tensors.values()}
    read = [0] * world
    dist.all_gather_object(read, sum(file.bytes_read for file in files.values()))
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}  # for the check alone
    if rank == 0:
        print(f"rank 0: {report}")
        stored = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
        size = sum(tensor.nbytes for tensor in stored.values())
        for r, count in enumerate(read):
            print(f"rank {r} read {count:,} of {size:,} bytes")
        print(f"all ranks together read the checkpoint {sum(read) / size:.2f} times")
        for name, value in stored.items():
            for theirs in ("model.", "_tokens", "mlp.", "_proj", "lm_"):
                name = name.replace(theirs, "")
            name = name.replace("layers", "blocks")
            assert torch.equal(whole.pop(name), value.bfloat16()), name
        assert not whole
        print(f"checked: {len(stored)} parameters have the values of the checkpoint")
        shutil.rmtree(folder)
    time.sleep(0.2)  # until gloo has let go of tensors: pytorch/pytorch#179291
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
