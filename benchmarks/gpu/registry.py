"""What a GPU case is, and the list of all of them.

A case is a small function that builds a `Work` on a device: our call, torch's call on the same tensors,
the destinations (compared bit for bit before timing) and the bytes moved. Register one with
``@case(...)``; several sizes or dtypes of one case are a loop around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.cases.registry import Group, targets
from benchmarks.targets import Condition

from .device import Device

__all__ = ["CASES", "CLOCKS", "GROUPS", "Case", "Make", "Work", "case", "group", "targets"]

Call = Callable[[], object]
Pair = tuple[Tensor, Tensor]

CLOCKS = {
    "wall": "host clock, from the call until the stream is empty",
    "events": "CUDA events around calls in a row, divided by their number",
}
"""What the ratio of a case is taken from."""

LIMITS = ("copy", "to_device", "to_host")
"""The best device-to-device copy, and the best transfer from and to pinned memory."""


@dataclass
class Work:
    """One case made ready: calls that do the same work on the same tensors.

    `ours` and `peer` are paramkit's and torch's. `bytes` are read plus written on the device; of a
    transfer, what has to cross the bus: its elements in the narrower dtype. A call may take several
    sets of tensors in turn, `turns` of them, so that none is in the cache. `others` are further
    sides. `counted` is our call where `ours` is the replay of a graph, which nobody counts. `sets`
    are single pairs that torch can compile a copy for.
    """

    ours: Call
    peer: Call
    dsts: list[Tensor]
    bytes: int
    turns: int = 1
    others: dict[str, Call] = field(default_factory=dict)
    counted: Call | None = None
    sets: list[Pair] = field(default_factory=list)
    keep: list[object] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)


Make = Callable[[bool, Device], Work]
"""Builds the work of a case on a device; with True a tiny one, of the same kind, for the tests."""


@dataclass(frozen=True)
class Case:
    """A name, its group, a sentence, what must hold, the builder, and how it is measured.

    `clock` is one of `CLOCKS`; `peer` names torch's side; `limit` says which transfer is the limit,
    if there is one. `launches` and `uploads` are what one call must take, where that is known.
    `staged`: it must go through pinned memory; otherwise through the kernels alone. `seconds` bounds
    the rounds of a full run, which are `least` or more. `compile`: torch.compile is a further side.
    Cases that are not `quick` are left out with ``--quick``.
    """

    name: str
    group: str
    what: str
    targets: tuple[Condition, ...]
    make: Make
    clock: str = "events"
    peer: str = "copy_"
    limit: str | None = "copy"
    launches: int | None = 1
    uploads: int | None = None
    staged: bool = False
    seconds: float = 1.2
    least: int = 9
    compile: bool = False
    quick: bool = True

    mode = "interleaved"  # as benchmarks.cases says it

    @property
    def needs(self) -> frozenset[str]:
        """The figures that the targets look at."""
        return frozenset(need for target in self.targets for need in target.needs)


CASES: list[Case] = []
GROUPS: dict[str, Group] = {}


def group(name: str, title: str) -> str:
    """Register a group; returns its name, for the cases."""
    if name in GROUPS:
        raise ValueError(f"two groups of GPU cases are named {name!r}")
    GROUPS[name] = Group(name, title)
    return name


def case(
    name: str, group: str, what: str, targets: Sequence[Condition], **options: Any
) -> Callable[[Make], Make]:
    """Register the decorated builder as a case; names are unique. `options` are fields of `Case`."""

    def register(make: Make) -> Make:
        made = Case(name, group, what, tuple(targets), make, **options)
        if any(known.name == name for known in CASES):
            raise ValueError(f"two GPU cases are named {name!r}")
        if group not in GROUPS:
            raise ValueError(f"case {name!r}: there is no group {group!r}")
        if made.clock not in CLOCKS:
            raise ValueError(f"case {name!r}: clock is {made.clock!r}, not one of {list(CLOCKS)}")
        if made.limit not in (None, *LIMITS):
            raise ValueError(f"case {name!r}: limit is {made.limit!r}, not one of {LIMITS}")
        CASES.append(made)
        return make

    return register
