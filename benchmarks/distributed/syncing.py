"""A step of weight sync: one trainer, three replicas with other names and fused layers."""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

import paramkit.distributed as pkd
from benchmarks.cases.models import nested, small
from paramkit import Rule

from .registry import Setting, Work, case

__all__: list[str] = []

# Layers of eight parameters each, features.
SIZES = {"full": (2500, 32), "quick": (250, 32), "tiny": (3, 8)}
FUSED = {
    "q": ("qkv", 0),
    "k": ("qkv", 1),
    "v": ("qkv", 2),
    "gate": ("gate_up", 0),
    "up": ("gate_up", 1),
}
RENAMED = {"o": "out", "down": "down", "norm": "norm"}


def _trained(layers: int, features: int) -> dict[str, tuple[int, ...]]:
    n = features
    one = {
        **{f"attention.{k}.weight": (n, n) for k in "qkvo"},
        **{f"mlp.{k}.weight": (2 * n, n) for k in ("gate", "up")},
        "mlp.down.weight": (n, 2 * n),
        "attention.norm.weight": (n,),
    }
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}


def _served(layers: int, features: int) -> dict[str, tuple[int, ...]]:
    n = features
    one = {
        "qkv": (3 * n, n),
        "out": (n, n),
        "gate_up": (4 * n, n),
        "down": (n, 2 * n),
        "norm": (n,),
    }
    return {f"model.blocks.{i}.{name}.weight": s for i in range(layers) for name, s in one.items()}


def _rules() -> list[Rule]:
    def names(part: str, dst: str) -> tuple[str, str]:
        where = "mlp" if part in ("gate", "up", "down") else "attention"
        return f"layers.{{i}}.{where}.{part}.weight", f"model.blocks.{{i}}.{dst}.weight"

    fused = [
        Rule(*names(part, dst), "h e -> (s h) e", at={"s": s}) for part, (dst, s) in FUSED.items()
    ]
    return [*fused, *(Rule(*names(part, dst)) for part, dst in RENAMED.items())]


def _slice(name: str, shape: tuple[int, ...], replica: Mapping[str, Tensor]) -> Tensor:
    """Where a parameter of the trainer goes."""
    _, i, _, part, _ = name.split(".")
    if part in RENAMED:
        return replica[f"model.blocks.{i}.{RENAMED[part]}.weight"]
    dst, s = FUSED[part]
    return replica[f"model.blocks.{i}.{dst}.weight"].narrow(0, s * shape[0], shape[0])


@case(
    "sync step",
    "a step from one trainer to three replicas, 20,000 small bfloat16 parameters, renamed and fused; torch's "
    "side is a loop of broadcast, and copy_ into slices made beforehand",
)
def _sync(setting: Setting) -> Work:
    shapes = _trained(*SIZES[setting.size])
    if dist.get_rank() == 0:
        trained = small(shapes)
        sync = pkd.Sync(None, source=nested(trained), rules=_rules())
        sent = list(trained.values())
        results: list[Tensor] = []

        def torchs() -> None:
            for tensor in sent:
                dist.broadcast(tensor, 0)
    else:
        replica = {
            name: torch.zeros(shape, dtype=torch.bfloat16)
            for name, shape in _served(*SIZES[setting.size]).items()
        }
        sync = pkd.Sync(nested(replica), rules=_rules())
        scratch = {s: torch.empty(s, dtype=torch.bfloat16) for s in set(shapes.values())}
        pairs = [(scratch[shape], _slice(name, shape, replica)) for name, shape in shapes.items()]
        results = list(replica.values())

        def torchs() -> None:
            for buffer, into in pairs:
                dist.broadcast(buffer, 0)
                into.copy_(buffer)

    def after(medians: Mapping[str, float]) -> dict[str, float]:
        spent = _python_seconds(sync)
        return {"Python time": spent * 1e9 / medians["paramkit"], "Python time, seconds": spent}

    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    return Work({"paramkit": sync.step, "torch": torchs}, results, total, after=after)


def _python_seconds(sync: pkd.Sync) -> float:
    """Seconds that a step spends in functions of Python, without what they call that is C; the median of seven.

    Of the processor's time: other processes that take turns with this one are not counted. The profiler's own
    cost is, so it is less in fact.
    """
    found = []
    for _ in range(7):
        profile = cProfile.Profile(time.thread_time)
        dist.barrier()
        profile.runcall(sync.step)
        rows = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        found.append(sum(row[2] for (file, _, _), row in rows if file != "~"))
    return statistics.median(found)
