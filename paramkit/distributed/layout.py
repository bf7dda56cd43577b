"""What a rank holds, as plain data that other ranks can be told; and who holds which part of a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..destinations import Destination, destinations_of, layout_finding, memory_key
from ..errors import Finding, PlanError, dtype_text
from ..sharding import Axes, Split, axes_at, is_sharded, place_of, spread_finding, spread_of
from ..sources.spread import Spread, SpreadPart, whole_axes

__all__ = [
    "Description",
    "Held",
    "Shard",
    "Tensors",
    "describe_model",
    "describe_source",
    "shards_of",
]


class Held(NamedTuple):
    """How ranks hold one tensor.

    Attributes:
        mesh: the sizes of a mesh of ranks.
        ranks: of the group, in row-major order of the mesh.
        splits: for each mesh axis how it splits the tensor; None: its ranks hold the same.
    """

    mesh: tuple[int, ...]
    ranks: tuple[int, ...]
    splits: tuple[Split, ...]


class Shard(NamedTuple):
    """A part of a tensor, and the ranks that hold it."""

    axes: Axes
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """Named tensors, without their values, in columns.

    Attributes:
        names, shapes, dtypes: of each tensor; shapes are global.
        kinds: as `Destination.kind`.
        aliases: further names of the same memory.
        same: number of the first tensor with the same memory.
        held: number of the tensor's layout in `layouts`.
        layouts: how this rank, and those of its meshes, hold tensors.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    kinds: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]
    same: tuple[int, ...]
    held: tuple[int, ...] = ()
    layouts: tuple[Held, ...] = ()

    def meaning(self) -> Description:
        """What must be equal on all ranks: everything but who holds what."""
        return replace(self, held=(), layouts=())

    def digest(self) -> str:
        """Equal for equal descriptions."""
        return hashlib.sha256(repr(_plain(self)).encode()).hexdigest()

    def difference(self, other: Description) -> tuple[str, str, str] | None:
        """The first name that differs in meaning: (name, what this says of it, what the other does)."""
        if self.names != other.names:
            mine, theirs = set(self.names), set(other.names)
            for name in (*self.names, *other.names):
                if name not in theirs:
                    return name, "there", "missing"
                if name not in mine:
                    return name, "missing", "there"
            for a, b in zip(self.names, other.names, strict=True):
                if a != b:
                    return a, "at this place of the order", f"{b} at this place"
        for k, name in enumerate(self.names):
            a, b = self._said(k), other._said(k)
            if a != b:
                return name, a, b
        return None

    def _said(self, k: int) -> str:
        text = f"{dtype_text(self.dtypes[k])} {self.shapes[k]}"
        if self.kinds[k] == "transient":
            text += ", not persistent"
        ties = [*self.aliases[k]]
        if self.same[k] != k:
            ties.append(self.names[self.same[k]])
        return text + (f", tied to {', '.join(ties)}" if ties else "")


def _plain(description: Description) -> object:
    # Read as text, in which equal values are equal; a pickle tells objects apart.
    d = description
    return (
        d.names,
        d.shapes,
        tuple(map(str, d.dtypes)),
        d.kinds,
        d.aliases,
        d.same,
        d.held,
        d.layouts,
    )


@dataclass
class Tensors:
    """What one rank has of a model or source: a description, and the tensors themselves by number."""

    description: Description
    local: list[Any] = field(default_factory=list)
    destinations: list[Destination] = field(default_factory=list)
    spreads: list[Spread | None] = field(default_factory=list)


def describe_model(
    model: nn.Module | Mapping[str, Any], ranks: Sequence[int], rank: int
) -> Tensors:
    """What a rank writes.

    Args:
        model: a module, or a mapping from names to tensors.
        ranks: the global rank of each of the group's.
        rank: of this process in the group.

    Raises:
        PlanError: a tensor that cannot be written, or one on a mesh with ranks outside of the group.
    """
    return _described(destinations_of(model, transient=True), ranks, rank, True)


def describe_source(
    source: nn.Module | Mapping[str, Any], ranks: Sequence[int], rank: int
) -> Tensors:
    """What a rank holds of a source, under every name."""
    if isinstance(source, nn.Module):
        found = destinations_of(source)
        named = [(n, d) for d in found for n in (d.name, *d.aliases)]
        listed = [replace(d, name=n, aliases=()) for n, d in named]
        made = _described(listed, ranks, rank, False)
        made.destinations = found
        return made
    if not isinstance(source, Mapping):
        raise PlanError(
            "the source cannot be used; nothing was written.",
            [
                Finding(
                    "source",
                    "type",
                    type(source).__name__,
                    "a module, a mapping from names to tensors, or a path",
                )
            ],
        )
    listed = []
    for name, tensor in source.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise PlanError(
                "the source cannot be used; nothing was written.",
                [Finding(str(name), "type", type(tensor).__name__, "a tensor under a name")],
            )
        listed.append(Destination(name, tensor, None, name, "tensor"))
    return _described(listed, ranks, rank, False)


def _described(
    listed: Sequence[Destination], ranks: Sequence[int], rank: int, destination: bool
) -> Tensors:
    place = {r: k for k, r in enumerate(ranks)}
    layouts: dict[Hashable, int] = {}
    spreads: list[Spread | None] = []
    findings: list[Finding] = []
    held: list[int] = []
    first: dict[object, int] = {}
    same: list[int] = []
    known: dict[tuple[int, tuple[Split, ...] | None], int] = {}
    for k, d in enumerate(listed):
        tensor = d.tensor
        # Destinations are one for each memory already.
        same.append(k if destination else first.setdefault(memory_key(tensor), k))
        if not is_sharded(tensor):
            meta = isinstance(tensor, Tensor) and tensor.is_meta and d.owner is None and destination
            finding = None if meta else layout_finding(d.name, tensor, destination)
            if finding is not None:
                findings.append(finding)
            held.append(layouts.setdefault(Held((1,), (rank,), (None,)), len(layouts)))
            spreads.append(None)
            continue
        spread, splits, mesh = spread_of(tensor), place_of(tensor).splits, tensor.device_mesh
        spreads.append(spread)
        finding = spread_finding(d.name, spread, destination)
        number = known.get((id(mesh), splits))
        if finding is None and number is None:
            assert splits is not None
            members = mesh.mesh.flatten().tolist()
            if all(r in place for r in members):
                layout = Held(tuple(mesh.shape), tuple(place[r] for r in members), splits)
                number = layouts.setdefault(layout, len(layouts))
                known[id(mesh), splits] = number
            else:
                finding = Finding(
                    d.name,
                    "device",
                    "a device mesh with ranks outside of the group",
                    "ranks of the group alone",
                    "pass a group that holds all of them",
                )
        if finding is not None:
            findings.append(finding)
        held.append(-1 if number is None else number)
    if findings:
        n = len(findings)
        what = "model" if destination else "source"
        raise PlanError(
            f"the {what} has {n} {'problem' if n == 1 else 'problems'}; nothing was written.",
            findings,
        )
    kinds = tuple("transient" if d.transient else "tensor" for d in listed)
    description = Description(
        tuple(d.name for d in listed),
        tuple(tuple(d.tensor.shape) for d in listed),
        tuple(d.tensor.dtype for d in listed),
        kinds,
        tuple(d.aliases for d in listed),
        tuple(same),
        tuple(held),
        tuple(layouts),  # type: ignore[arg-type]
    )
    return Tensors(description, [d.tensor for d in listed], list(listed), spreads)


def spreads(description: Description, own: Tensors | None, what: str) -> list[Spread]:
    """The tensors of a description, with the parts that this rank holds."""
    if own is None:
        columns = zip(description.shapes, description.dtypes, description.same, strict=True)
        return [Spread(shape, dtype, (), (what, same)) for shape, dtype, same in columns]
    out = []
    for k, (local, spread) in enumerate(zip(own.local, own.spreads, strict=True)):
        shape, dtype = description.shapes[k], description.dtypes[k]
        if spread is not None:
            pass
        elif local.is_meta:
            spread = Spread(shape, dtype, ())
        else:
            spread = Spread(
                shape, dtype, (SpreadPart(whole_axes(shape), local),), None, local.device
            )
        # What is tied is what all ranks agreed on, not what happens to be one memory here.
        spread.key = (what, description.same[k])
        out.append(spread)
    return out


@lru_cache(maxsize=1 << 14)
def shards_of(helds: tuple[Held, ...], shape: tuple[int, ...]) -> tuple[Shard, ...]:
    """The parts of a tensor that are held, each once, with all ranks that hold it. Empty parts are left out."""
    found: dict[Axes, list[int]] = {}
    for held in helds:
        places = product(*(range(n) for n in held.mesh))
        for place, rank in zip(places, held.ranks, strict=True):
            axes = axes_at(shape, held.mesh, place, held.splits)
            if all(axes):
                found.setdefault(axes, []).append(rank)
    return tuple(Shard(axes, tuple(dict.fromkeys(ranks))) for axes, ranks in found.items())
