"""Where a DTensor's shards lie in the whole tensor, from its mesh and placements alone."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from torch import nn

from .errors import Finding
from .sources.spread import Segment, Spread, SpreadPart

__all__ = [
    "any_sharded",
    "axes_at",
    "axes_by_rank",
    "is_sharded",
    "place_of",
    "sharded_key",
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


class _Place(NamedTuple):
    """What DTensors of one shape, mesh and placements have in common on this rank.

    Attributes:
        mesh: weakly: it may go, with its process groups, while this is remembered.
        splits: None where a placement is neither a shard nor a replica.
        axes: of this rank's part, None where it has none.
        shape: of the part.
        text: of shape and placements.
    """

    mesh: weakref.ref[Any]
    splits: tuple[Split, ...] | None
    axes: Axes | None
    shape: tuple[int, ...]
    text: tuple[Any, ...]


_places: dict[tuple[Any, ...], _Place] = {}


def place_of(tensor: Any) -> _Place:
    """Where a DTensor's shard of this rank lies. Models repeat shapes, so nearly all are known."""
    spec = tensor._spec
    mesh = spec.mesh
    key = (id(mesh), spec.placements, tensor.shape)
    found = _places.get(key)
    if found is None or found.mesh() is not mesh:  # the number was that of a mesh that is gone
        if len(_places) > 1 << 14:
            _places.clear()
        found = _places[key] = _placed(tensor)
    return found


def _placed(tensor: Any) -> _Place:
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    own, text = weakref.ref(mesh), (shape, str(tensor.placements))
    try:
        splits = tuple(split_of(p) for p in tensor.placements)
    except ValueError:
        return _Place(own, None, None, (), text)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return _Place(own, splits, None, (), text)
    axes = axes_at(shape, tuple(mesh.shape), tuple(coordinate), splits)
    return _Place(own, splits, axes, SpreadPart(axes, None).shape, text)


def axes_by_rank(tensor: Any) -> dict[int, Axes]:
    """For each global rank of a DTensor's mesh the indices that it holds."""
    place = place_of(tensor)
    if place.splits is None:
        return {}
    mesh = tuple(tensor.device_mesh.shape)
    coordinates = product(*(range(n) for n in mesh))
    ranks = tensor.device_mesh.mesh.flatten().tolist()
    shape = tuple(tensor.shape)
    return {
        rank: axes_at(shape, mesh, coordinate, place.splits)
        for rank, coordinate in zip(ranks, coordinates, strict=True)
    }


def spread_of(tensor: Any) -> Spread:
    """A DTensor as a tensor in parts: the part of this rank, if it has one."""
    local, place = tensor._local_tensor, place_of(tensor)
    parts = () if place.axes is None else (SpreadPart(place.axes, local),)
    key = _key(local, place) or (id(tensor),)
    return Spread(tensor.shape, tensor.dtype, parts, key, local.device, tensor)


def sharded_key(tensor: Any) -> Hashable:
    """Equal for DTensors of one memory: a state dict detaches, so tied weights are two objects in it."""
    return _key(tensor._local_tensor, place_of(tensor)) or (id(tensor),)


def _key(local: Any, place: _Place) -> Hashable:
    """None where a local tensor has no memory to go by."""
    if local.is_meta:
        return None
    try:
        if local.numel():
            address = local.data_ptr()
        else:
            # An empty shard has no address. Ties are known by its storage: all ranks must see the same ones.
            storage = local.untyped_storage()
            return ("empty", storage._cdata, local.storage_offset(), local.dtype, *place.text)
    except RuntimeError:  # a subclass without storage of its own
        return None
    # What the place does not say of a view: its strides, and its dtype.
    return (address, local.dtype, local.stride(), *place.text) if address else None


def spread_finding(name: str, spread: Spread, destination: bool) -> Finding | None:
    """Why a DTensor cannot take part in a write, or None."""
    from .destinations import layout_finding

    if spread.checked:
        return None
    tensor = spread.wrapper
    place = place_of(tensor)
    if place.splits is None:
        return Finding(
            name,
            "layout",
            f"a DTensor with placements {tensor.placements}, whose values are not known yet",
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
    if spread.parts:
        # An empty shard of several axes is (0, 0) after fully_shard, whatever its sizes are.
        if local.shape != place.shape and (local.numel() or 0 not in place.shape):
            return Finding(
                name,
                "layout",
                f"a local tensor of {tuple(local.shape)}",
                f"{place.shape}, the shard that {tensor.placements} gives this rank",
                "make the DTensor with distribute_tensor or fully_shard",
            )
    finding = layout_finding(name, local, destination)
    spread.checked = finding is None
    return finding


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
