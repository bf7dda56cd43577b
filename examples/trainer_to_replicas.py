"""A trainer, sharded with FSDP2, sends its weights to two replicas after each of ten steps.

    torchrun --nproc-per-node 4 examples/trainer_to_replicas.py [--checksum bucket|parameter|both]

The last two ranks are the replicas, as inference engines keep them: other names, fused weights, bfloat16. The
others train, in float32. The plan is compiled once, when the `Sync` is made; a step is packing, sending and
unpacking, with bfloat16 on the way, since that is the narrower of the two.
"""

import argparse
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import paramkit
import paramkit.distributed as pkd
from paramkit import Rule

STEPS, LAYERS, DIM, FFN = 10, 4, 128, 512

# For each layer: up and gate become two halves of one weight; the rest is renamed.
RULES = [
    Rule("layers.{i}.gate.weight", "blocks.{i}.gate_up.weight", "f e -> (s f) e", at={"s": 0}),
    Rule("layers.{i}.up.weight", "blocks.{i}.gate_up.weight", "f e -> (s f) e", at={"s": 1}),
    Rule("layers.{i}.down.weight", "blocks.{i}.down.weight"),
]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, FFN, bias=False)
        self.up = nn.Linear(DIM, FFN, bias=False)
        self.down = nn.Linear(FFN, DIM, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def forward(self, x):
        return self.layers(x)


def make_replica():
    """What an engine has."""
    block = {"gate_up": (2 * FFN, DIM), "down": (DIM, FFN)}
    shapes = {f"blocks.{i}.{n}.weight": s for i in range(LAYERS) for n, s in block.items()}
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def train(model, optimizer):
    x = torch.randn(16, DIM)
    loss = (model(x) - x.flip(-1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--checksum", choices=["bucket", "parameter", "both"])
    checksum = options.parse_args().checksum

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    trainers = world - 2
    mesh = DeviceMesh("cpu", range(trainers))  # all ranks take part in making it
    torch.manual_seed(rank)
    if rank < trainers:
        model = Trainer()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        sync = pkd.Sync(source=model, rules=RULES, checksum=checksum)
    else:
        replica = make_replica()
        sync = pkd.Sync(replica, rules=RULES, checksum=checksum)

    if rank == 0:
        print("step  loss    version  sent by rank 0  messages  time")
    for step in range(1, STEPS + 1):
        loss = train(model, optimizer) if rank < trainers else None
        report = (
            sync.step()
        )  # on every rank: it returns when all have the new version, or raises on all
        if rank == 0:
            sent = f"{report.bytes_sent / 2**20:.2f} MiB"
            print(
                f"{step:4}  {loss:.4f}  {report.version:7}  {sent:>14}  {report.messages:8}  "
                f"{report.seconds * 1e3:.1f} ms"
            )

    # The check: what a replica must hold, made from whole tensors in one process.
    if rank < trainers:
        wanted = make_replica()
        paramkit.transplant(
            wanted, {n: p.full_tensor() for n, p in model.named_parameters()}, RULES
        )
    mine = paramkit.fingerprint(wanted if rank < trainers else replica)
    said = [None] * world
    dist.all_gather_object(said, (mine, sync.version, sync.torn))
    if rank == 0:
        for r, (marks, version, torn) in enumerate(said[trainers:], trainers):
            assert marks == mine and version == STEPS and torn is None
            print(f"replica on rank {r}: version {version}, whole, bits as expected")
    time.sleep(0.2)  # until gloo has let go of tensors: pytorch/pytorch#179291
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
