"""What a case of several processes is, and the list of all of them.

Every rank builds its part of a `Work`: calls that all ranks make together, and the local tensors that they
write. Modules register their builders with ``@case(...)``; what is promised is in
`benchmarks.distributed.targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from benchmarks.targets import Condition, Figure

from .targets import TARGETS

__all__ = ["CASES", "GROUP", "SIZES", "Case", "Make", "Setting", "Work", "case"]

GROUP = "distributed"

SIZES = ("full", "quick", "tiny")
"""As promised; smaller, to see whether it runs; tiny, for the tests: times of it mean nothing."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where a rank builds its part: the size, and a folder that all ranks see."""

    size: str
    folder: Path


@dataclass
class Work:
    """A rank's part of a case. All calls are collective.

    Attributes:
        sides: name -> call; "paramkit" and "torch" are compared, others are reported beside them.
        results: local tensors that the sides write; none on a rank that only sends.
        bytes: of the values that all ranks together end up with, each element once.
        checked: name -> call that leaves the same values in `results`, for sides that do not.
        after: figures that targets look at, and facts, measured when the rounds are over. Gets the median of
            each side in nanoseconds. Of each figure the highest of all ranks counts.
    """

    sides: dict[str, Call]
    results: list[Tensor]
    bytes: int
    checked: dict[str, Call] = field(default_factory=dict)
    after: Callable[[Mapping[str, float]], dict[str, float]] | None = None


Make = Callable[[Setting], Work]


@dataclass(frozen=True)
class Case:
    """A name, a sentence, the names of the sides, and the builder. `seconds` bounds the rounds of a full run."""

    name: str
    what: str
    make: Make
    seconds: float

    @property
    def targets(self) -> tuple[Condition, ...]:
        """What must hold."""
        return TARGETS[self.name]


CASES: list[Case] = []


def case(name: str, what: str, seconds: float = 40.0) -> Callable[[Make], Make]:
    """Register a builder."""
    if name not in TARGETS:
        raise ValueError(f"no targets are set for {name!r}")

    def register(make: Make) -> Make:
        CASES.append(Case(name, what, make, seconds))
        return make

    return register


def figure(value: float) -> Figure:
    """A figure without a spread."""
    return Figure(value, value, value)
