"""A step of weight sync: one trainer, three replicas with other names and fused layers."""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Mapping

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

    Of the processor's time: other processes that take turns with this one are not counted. What the profiler
    adds to a call of a Python function is taken off; what it adds to calls of C is not, so it is less in fact.
    """
    found = []
    for _ in range(7):
        dist.barrier()
        seconds, calls = _profiled(sync.step)
        found.append(seconds - calls * _cost_of_a_call())
    return statistics.median(found)


def _profiled(call: Callable[[], object]) -> tuple[float, int]:
    """(seconds in functions of Python, how often they were called)."""
    profile = cProfile.Profile(time.thread_time)
    profile.runcall(call)
    rows = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    own = [(row[2], row[1]) for (file, _, _), row in rows if file != "~"]
    return sum(seconds for seconds, _ in own), sum(calls for _, calls in own)


def _cost_of_a_call() -> float:
    """Seconds that the profiler adds to a call of a Python function, at the least."""

    def nothing() -> None:
        pass

    def many() -> None:
        for _ in range(1000):
            nothing()

    begin = time.thread_time()
    many()
    plain = time.thread_time() - begin
    seconds, calls = _profiled(many)
    return max(0.0, (seconds - plain) / calls)
