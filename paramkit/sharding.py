"""Where a DTensor's shards lie in the whole tensor, from its mesh and placements alone."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

from torch import nn

from .errors import Finding
from .sources.spread import Segment, Spread, SpreadPart

__all__ = [
    "any_sharded",
    "axes_at",
    "is_sharded",
    "split_of",
    "spread_finding",
    "spread_of",
    "unsharded_finding",
]

Axes = tuple[tuple[Segment, ...], ...]
# A placement as plain data: (axis, split factor) of a shard, None of what every rank of the mesh axis holds.
Split = tuple[int, int] | None


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor. Where nobody made one, torch's module for them is not even imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[object]) -> bool:
    """Whether one of them is a DTensor or a tensor in parts."""
    # The types of all first: of tens of thousands of tensors there are few.
    module = sys.modules.get("torch.distributed.tensor")
    kinds = (Spread,) if module is None else (Spread, module.DTensor)
    return any(issubclass(kind, kinds) for kind in set(map(type, tensors)))


def split_of(placement: Any) -> Split:
    """A placement as plain data.

    Raises:
        ValueError: one that is neither a shard nor a replica, such as `Partial`.
    """
    if placement.is_replicate():
        return None
    kind = type(placement).__name__
    if kind == "_StridedShard":
        return placement.dim, placement.split_factor
    if placement.is_shard():
        return placement.dim, 1
    raise ValueError(str(placement))


@lru_cache(maxsize=1 << 14)
def axes_at(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
    splits: tuple[Split, ...],
) -> Axes:
    """The indices of a tensor that the rank at a mesh coordinate holds.

    Args:
        shape: of the whole tensor.
        mesh: the sizes of the mesh.
        coordinate: of the rank.
        splits: one for each axis of the mesh, applied in this order, as torch does.

    >>> axes_at((5,), (2,), (1,), ((0, 1),))
    ((Segment(start=3, length=2, at=0),),)
    >>> axes_at((8,), (2,), (0,), ((0, 2),))  # a shard of each half
    ((Segment(start=0, length=2, at=0), Segment(start=4, length=2, at=2)),)
    """
    axes = [[(0, n)] if n else [] for n in shape]
    for size, place, split in zip(mesh, coordinate, splits, strict=True):
        if split is None:
            continue
        axis, factor = split
        runs = axes[axis]
        held = sum(n for _, n in runs)
        taken: list[tuple[int, int]] = []
        for first, n in _chunks(held, factor):
            start, length = _chunks(n, size)[place]
            taken += _taken(runs, first + start, length)
        axes[axis] = taken
    return tuple(map(_segments, axes))


def _chunks(n: int, count: int) -> list[tuple[int, int]]:
    """(start, length) of the parts that torch.chunk makes, with empty ones up to `count`."""
    size = -(-n // count)
    return [(min(k * size, n), min((k + 1) * size, n) - min(k * size, n)) for k in range(count)]


def _taken(runs: Sequence[tuple[int, int]], start: int, length: int) -> list[tuple[int, int]]:
    """Elements [start, start + length) of runs that lie one behind the other."""
    out = []
    for first, n in runs:
        low, high = max(start, 0), min(start + length, n)
        if low < high:
            out.append((first + low, high - low))
        start -= n
    return out


def _segments(runs: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    out: list[Segment] = []
    at = 0
    for start, length in runs:
        if out and out[-1].start + out[-1].length == start:
            out[-1] = out[-1]._replace(length=out[-1].length + length)
        else:
            out.append(Segment(start, length, at))
        at += length
    return tuple(out)


def spread_of(tensor: Any) -> Spread:
    """A DTensor as a tensor in parts: the part of this rank, if it has one."""
    local, mesh = tensor._local_tensor, tensor.device_mesh
    parts: list[SpreadPart] = []
    coordinate = mesh.get_coordinate()
    shape = tuple(tensor.shape)
    try:
        splits = tuple(split_of(p) for p in tensor.placements)
    except ValueError:
        splits = None  # spread_finding says so
    if coordinate is not None and splits is not None:
        axes = axes_at(shape, tuple(mesh.shape), tuple(coordinate), splits)
        parts.append(SpreadPart(axes, local))
    return Spread(shape, tensor.dtype, parts, _key(tensor, local), local.device, tensor)


def _key(tensor: Any, local: Any) -> Hashable:
    from .destinations import memory_key

    # Two DTensors may be one memory: a state dict detaches, so tied weights are two objects in it.
    own = memory_key(local)
    if own == id(local) or prod(tensor.shape) == 0:
        return (id(tensor),)
    return ("shard", own, tuple(tensor.shape), str(tensor.placements))


def spread_finding(name: str, spread: Spread, destination: bool) -> Finding | None:
    """Why a DTensor cannot take part in a write, or None."""
    from .destinations import layout_finding

    tensor = spread.wrapper
    if tensor is None:
        return None
    for placement in tensor.placements:
        try:
            split_of(placement)
        except ValueError:
            return Finding(
                name,
                "layout",
                f"a DTensor with placement {placement}, whose values are not known yet",
                "placements Shard or Replicate",
                "redistribute() it first",
            )
    local = tensor._local_tensor
    if local.is_meta:
        what = "destination" if destination else "source"
        return Finding(
            name,
            "meta",
            f"a meta {what}, which has no memory",
            "shards with memory",
            "module.to_empty(device=...) gives a sharded module memory",
        )
    for part in spread.parts:
        if tuple(local.shape) != part.shape:
            return Finding(
                name,
                "layout",
                f"a local tensor of {tuple(local.shape)}",
                f"{part.shape}, the shard that {tensor.placements} gives this rank",
                "make the DTensor with distribute_tensor or fully_shard",
            )
    return layout_finding(name, local, destination)


def unsharded_finding(model: object) -> Finding | None:
    """FSDP shows full parameters between a forward and the next reshard: what is written there is lost."""
    if not isinstance(model, nn.Module) or "torch.distributed.fsdp" not in sys.modules:
        return None
    for name, module in model.named_modules():
        get_state = getattr(module, "_get_fsdp_state", None)
        if get_state is None:
            continue
        state = get_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [
            getattr(state, "_fsdp_param_group", None)
        ]
        if any(g is not None and getattr(g, "is_unsharded", False) for g in groups):
            return Finding(
                name or "model",
                "layout",
                "an FSDP module whose parameters are gathered now",
                "its shards: what is written to gathered parameters is lost",
                "call reshard() on it first",
            )
    return None
