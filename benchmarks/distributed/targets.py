"""What each case is held to, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.targets import AtLeast, AtMost, Condition

__all__ = ["TARGETS", "Most"]

MIB = 1 << 20


@dataclass(frozen=True)
class Most(AtMost):
    """As `AtMost`, of the highest figure of all ranks. `unit` is how people read it."""

    unit: str = "x"  # "bytes", "%", "x"

    def shown(self, value: float) -> str:
        """A figure in a verdict."""
        return f"{self.what} {self.text(value)}"

    def limit(self) -> str:
        """What is wanted, in a verdict."""
        return self.text(self.value)

    def text(self, value: float) -> str:
        """A value as people read it."""
        if self.unit == "bytes":
            return f"{value / MIB:.4g} MiB"
        if self.unit == "%":
            return f"{100 * value:.2g}%"
        return f"{value:.4g}x"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**super().as_dict(), "unit": self.unit}

    def __str__(self) -> str:
        return f"{self.what} <= {self.text(self.value)}"


STAGING = Most("staging", 256 * MIB, "bytes")
READ = Most("bytes read, of its share", 1.0, "x")
PYTHON = Most("Python time", 0.01, "%")

TARGETS: dict[str, tuple[Condition, ...]] = {
    "small from rank 0": (AtLeast("ratio", 5.0),),
    "large from rank 0": (AtLeast("ratio", 1.2), STAGING),
    "files into 2-D": (AtLeast("ratio", 2.0), READ),
    "sync step": (AtLeast("ratio", 10.0), PYTHON),
    "reshard small": (AtLeast("ratio", 1.5),),
    "reshard medium": (AtLeast("ratio", 1.5),),
    "reshard large": (AtLeast("ratio", 1.5),),
}
