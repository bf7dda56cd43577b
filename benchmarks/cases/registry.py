"""What a case is, and the list of all of them.

A case is a small function that builds a `Work`: our call, torch's call on the same tensors, the
destinations (compared bit for bit before timing) and the bytes moved, read plus written. Register
one with ``@case(...)``; several sizes or dtypes of one case are a loop around it. Of two decorators on
one builder the lower one comes first in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks import plain
from benchmarks.targets import GUARD, AtLeast, Condition

__all__ = [
    "CASES",
    "GROUPS",
    "KIB",
    "MIB",
    "MODES",
    "Case",
    "Group",
    "Make",
    "Work",
    "case",
    "group",
    "moved",
    "targets",
]

KIB = 1024
MIB = 1024 * KIB

MODES = ("interleaved", "hot", "memory")
"""Timed in turns; timed each side alone in a loop; temporary memory instead of time."""


@dataclass
class Work:
    """One case made ready: calls that do the same work on the same tensors.

    `ours` and `peer` are paramkit's and torch's; `numpy` is numpy's where it has the dtypes. `inner`
    calls make one sample. Where our call writes nothing, `proof` is one that writes what it found, and
    is checked in its place. `half` is our call for half as much, to see how cost grows. `dense` is the
    destination and the source (None: a fill) of a case that libc can do too; `pairs` is a list of small
    writes as a plain C loop.
    """

    ours: Callable[[], object]
    peer: Callable[[], object]
    dsts: list[Tensor]
    bytes: int
    inner: int = 1
    numpy: Callable[[], object] | None = None
    dense: tuple[Tensor, Tensor | None] | None = None
    pairs: plain.Pairs | None = None
    proof: Callable[[], object] | None = None
    half: Callable[[], object] | None = None
    keep: list[object] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    def checked(self, numpy: bool = True) -> list[Callable[[], object]]:
        """The calls that must leave the same bytes as `peer`."""
        beside = [self.numpy] if numpy and self.numpy is not None else []
        return [self.proof or self.ours, *beside]


Make = Callable[[bool], Work]
"""Builds the work of a case; with True a tiny one, of the same kind, for the tests."""


@dataclass(frozen=True)
class Case:
    """A name, its group, a sentence, what must hold, how it is measured, and the builder.

    `limit` says which 256 MiB run is the limit, a "copy", a "fill" or a "compare". `seconds` bounds the rounds of
    a full run. Cases that are not `quick` are left out with ``--quick``.
    """

    name: str
    group: str
    what: str
    targets: tuple[Condition, ...]
    mode: str
    make: Make
    limit: str = "copy"
    seconds: float = 3.0
    quick: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """The figures that the targets look at."""
        return frozenset(need for target in self.targets for need in target.needs)


@dataclass(frozen=True)
class Group:
    """Cases shown together; `mean` is the least geometric mean of their ratios, if there is one."""

    name: str
    title: str
    mean: float | None = None


CASES: list[Case] = []
GROUPS: dict[str, Group] = {}


def group(name: str, title: str, mean: float | None = None) -> str:
    """Register a group; returns its name, for the cases."""
    if name in GROUPS:
        raise ValueError(f"two groups of benchmark cases are named {name!r}")
    GROUPS[name] = Group(name, title, mean)
    return name


def targets(
    ratio: float = GUARD, limit: float | None = None, ceiling: float | None = None
) -> tuple[Condition, ...]:
    """The usual conditions: a ratio to torch, a share of the limit, a share of a plain copy."""
    found: list[Condition] = [AtLeast("ratio", ratio)]
    if limit is not None:
        found.append(AtLeast("limit", limit))
    if ceiling is not None:
        found.append(AtLeast("ceiling", ceiling))
    return tuple(found)


def case(
    name: str,
    group: str,
    what: str,
    targets: tuple[Condition, ...],
    mode: str = "interleaved",
    limit: str = "copy",
    seconds: float = 3.0,
    quick: bool = True,
) -> Callable[[Make], Make]:
    """Register the decorated builder as a case; names are unique."""
    if any(known.name == name for known in CASES):
        raise ValueError(f"two benchmark cases are named {name!r}")
    if group not in GROUPS:
        raise ValueError(f"case {name!r}: there is no group {group!r}")
    if mode not in MODES:
        raise ValueError(f"case {name!r}: mode is {mode!r}, not one of {', '.join(MODES)}")

    def register(make: Make) -> Make:
        CASES.append(Case(name, group, what, targets, mode, make, limit, seconds, quick))
        return make

    return register


def moved(dsts: Sequence[Tensor], srcs: Sequence[Tensor] = ()) -> int:
    """Bytes written to `dsts` plus bytes read from `srcs`, counting elements of the views."""
    return sum(t.numel() * t.element_size() for t in (*dsts, *srcs))
