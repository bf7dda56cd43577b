"""What a plan did: the result of `Plan.apply()`."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Cast", "Report", "Summary"]


@dataclass(frozen=True)
class Cast:
    """A destination that was written from another dtype.

    Attributes:
        name: the destination.
        source: the source's name.
        src_dtype, dst_dtype: without "torch.".

    >>> print(Cast("fc.weight", "weight", "float32", "bfloat16"))
    fc.weight: float32 -> bfloat16
    """

    name: str
    source: str
    src_dtype: str
    dst_dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.src_dtype} -> {self.dst_dtype}"


@dataclass(frozen=True)
class Summary:
    """What a plan writes; the same for every `apply()` of it.

    Attributes:
        names: the destinations written, in full or in part.
        writes: how many writes, slices counted one by one.
        elements: destination elements written.
        bytes: destination bytes written.
        bytes_moved: bytes read and bytes written, what the memory has to move.
        casts: the writes that change the dtype.
        kept: destinations left alone on purpose.
        dropped: sources left unread on purpose.
        routes: how many writes each kernel family does.
        backend: "cpu" (compiled kernels) or "native" (torch's own `copy_`).

    >>> import torch, paramkit
    >>> summary = paramkit.plan({"w": torch.zeros(2).half()}, {"w": torch.ones(2)}).apply().summary
    >>> summary.names, summary.bytes, summary.bytes_moved, [str(c) for c in summary.casts]
    (('w',), 4, 12, ['w: float32 -> float16'])
    """

    names: tuple[str, ...] = ()
    writes: int = 0
    elements: int = 0
    bytes: int = 0
    bytes_moved: int = 0
    casts: tuple[Cast, ...] = ()
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    routes: dict[str, int] = field(default_factory=dict)
    backend: str = "native"


@dataclass(frozen=True)
class Report:
    """The outcome of one `apply()`: its `summary` and the `seconds` that the writes took.

    On CUDA that is the time until the device had been told: it may still be writing.

    >>> import torch, paramkit
    >>> weight = torch.zeros(4)
    >>> report = paramkit.plan([weight], [torch.ones(4)]).apply()
    >>> report.summary.elements, report.summary.bytes
    (4, 16)
    """

    summary: Summary
    seconds: float

    @property
    def gbps(self) -> float:
        """10**9 bytes read and written a second."""
        return self.summary.bytes_moved / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        s = self.summary
        routes = ", ".join(f"{n} {family}" for family, n in sorted(s.routes.items()) if n)
        lines = [
            f"{_count(len(s.names), 'tensor')} written by {_count(s.writes, 'write')}: "
            f"{s.elements:,} elements, {_bytes(s.bytes)}",
            f"in {_seconds(self.seconds)}, {self.gbps:.1f} GB/s read + write",
            f"backend {s.backend}: {routes or 'nothing to do'}",
        ]
        for what, names in (
            ("cast", [str(c) for c in s.casts]),
            ("left alone", s.kept),
            ("dropped", s.dropped),
        ):
            if names:
                lines.append(f"{len(names)} {what}: {_some(names)}")
        return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _some(names: object, most: int = 6) -> str:
    from .errors import fold_names

    folded = [name for name, _ in fold_names(list(names))]  # type: ignore[call-overload]
    more = f", and {len(folded) - most} more" if len(folded) > most else ""
    return ", ".join(folded[:most]) + more
