"""Steps of `Sync` on four gloo processes of one machine, beside what the model says of them.

What the model needs of the machine (`B`, `M`, `A`) is measured without paramkit's transfers, all ranks at once, since
they share the machine. The model is the code that the document shows.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from tests import ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
__all__ = ["PAGE", "SHAPES", "compared"]

RANKS = 4
REPEATS = 9
BUCKET = 4 << 20
ROWS = 4096
# Trainers, copies, ranks of a copy: all of them different ranks.
SHAPES = {
    "2 trainers to 1 replica on 2 ranks": (2, 1, 2),
    "1 trainer to 1 replica on 3 ranks": (1, 1, 3),
    "2 trainers to 2 replicas": (2, 2, 1),
    "1 trainer to 3 replicas, broadcast": (1, 3, 1),
}


def model() -> Callable[..., dict[str, float]]:
    """`step` of the document."""
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)[0], names)
    found: Callable[..., dict[str, float]] = names["step"]
    return found


def case(rank: int, S: int, C: int, T: int, tensors: int) -> dict[str, Any]:
    """On one rank of `RANKS`: what a step of these ranks costs, and the machine by itself."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    import paramkit.distributed as pkd

    trainers = DeviceMesh("cpu", list(range(S)))
    copies = [DeviceMesh("cpu", list(range(S + c * T, S + (c + 1) * T))) for c in range(C)]
    columns = ROWS // 4 * 3 if T == 3 else ROWS

    def sharded(mesh: DeviceMesh, axis: int, dtype: torch.dtype) -> dict[str, Any]:
        shape = [ROWS, columns]
        shape[axis] //= mesh.size()
        local = [torch.ones(shape, dtype=dtype) for _ in range(tensors)]
        return {
            f"w{k}": DTensor.from_local(t, mesh, [Shard(axis)], run_check=False)
            for k, t in enumerate(local)
        }

    source = sharded(trainers, 0, torch.float32) if rank < S else None
    copy = (rank - S) // T
    replica = sharded(copies[copy], 1, torch.bfloat16) if 0 <= copy < C else None
    sync = pkd.Sync(replica, source=source, bucket_bytes=BUCKET)
    traffic = sync._work.passes[0]
    sync.step()
    reports = []
    for _ in range(REPEATS):
        dist.barrier()
        reports.append(sync.step())
    return {
        "seconds": [r.seconds for r in reports],
        "sent": reports[0].bytes_sent,
        "received": reports[0].bytes_received,
        "messages": reports[0].messages,
        "staging": traffic.staging,
        "elements": tensors * ROWS * columns,
        "B": _bandwidth(rank, S, C * T),
        "M": _kernels(traffic),
        "A": _agreement(sync._work.talk),
    }


def _bandwidth(rank: int, senders: int, receivers: int) -> float:
    """Bytes a second of the busiest rank, all pairs at once, in messages of a bucket; nothing is packed."""
    others = range(senders, senders + receivers) if rank < senders else range(senders)
    kind = dist.isend if rank < senders else dist.irecv
    if rank >= senders + receivers:
        others = range(0)
    buffers = [torch.zeros(BUCKET, dtype=torch.uint8) for _ in others]
    rounds, best = 12, []
    for _ in range(5):
        dist.barrier()
        start = perf_counter()
        for _ in range(rounds):
            works = [kind(b, other) for b, other in zip(buffers, others)]
            for work in works:
                work.wait()
        dist.barrier()
        best.append(perf_counter() - start)
    return max(senders, receivers) * rounds * BUCKET / statistics.median(best)


def _kernels(traffic: Any) -> float:
    """Bytes a second, read and written, of packing or unpacking, all ranks at once; 0 of a rank that does neither."""
    plans = [p for r in traffic.rounds for p in (r.pack, r.unpack) if p is not None]
    elements = sum(m.bytes // 2 for r in traffic.rounds for _, _, m in (*r.sends, *r.receives))
    width = 6 if any(r.sends for r in traffic.rounds) else 4
    times = []
    for _ in range(5):
        dist.barrier()
        start = perf_counter()
        for plan in plans:
            plan.run(None)
        times.append(perf_counter() - start)
    return elements * width / statistics.median(times) if plans else 0.0


def _agreement(talk: Any) -> float:
    times = []
    for _ in range(50):
        start = perf_counter()
        talk.numbers([0, 0])
        times.append(perf_counter() - start)
    return statistics.median(times)


def compared(name: str, tensors: int) -> dict[str, Any]:
    """One shape: what was predicted, and what was measured, of the busiest rank of each kind."""
    S, C, T = SHAPES[name]
    found = ranks.run(case, RANKS, S, C, T, tensors, timeout=300.0, group_timeout=120.0)
    senders, receivers = found[:S], found[S : S + C * T]
    machine = {
        "B": min(f["B"] for f in found),
        "M": min(f["M"] for f in found if f["M"]),
        "A": max(f["A"] for f in found),
    }
    n = found[0]["elements"]
    said = model()(N=n, src=4, dst=2, S=S, C=C, T=T, b=BUCKET, L=0.0, o=0.0, **machine)
    slowest = [max(times) for times in zip(*(f["seconds"] for f in found))]
    return {
        "name": name,
        "elements": n,
        "machine": machine,
        "predicted": said,
        "measured": {
            "sent": max(f["sent"] for f in senders),
            "received": max(f["received"] for f in receivers),
            "messages sent": max(f["messages"] for f in senders) * C,
            "messages received": max(f["messages"] for f in receivers),
            "staging sender": max(f["staging"] for f in senders),
            "staging receiver": max(f["staging"] for f in receivers),
            "seconds": statistics.median(slowest),
            "quartiles": statistics.quantiles(slowest, n=4)[::2],
        },
    }
