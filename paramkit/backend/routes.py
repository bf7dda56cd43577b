"""Which kernel family ran, counted per thread, so that a test can assert the route and not only the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FAMILIES = ("copy", "rows", "transpose", "general", "fill", "native", "staged")


@dataclass
class Trace:
    """The writes done inside a :func:`trace` block.

    Attributes:
        routes: how many, by kernel family; "native" is torch's own `copy_` or `fill_`, "staged" a copy
            between host and device through pinned memory.
        casts: how many of them the kernels converted on the way.

    >>> Trace(routes={"copy": 2, "native": 1}, casts=1).routes["copy"]
    2
    """

    routes: dict[str, int] = field(default_factory=dict)
    casts: int = 0


def counts() -> dict[str, int]:
    """Writes done by this thread since it started, by kernel family, and how many were a "cast"."""
    from . import loader, native

    total = dict.fromkeys((*FAMILIES, "cast"), 0)
    total["native"] += native.writes_done()
    extension = loader.extension()
    if extension is not None:
        for family, n in extension.routes().items():
            total[family] += n
    return total


@contextmanager
def trace() -> Iterator[Trace]:
    """Count the writes that this thread does inside the block, by kernel family; never raises.

    Yields:
        A `Trace`, which is filled when the block ends.

    >>> import torch, paramkit
    >>> with paramkit.backend.trace() as t:
    ...     paramkit.foreach_copy_([torch.zeros(3)], [torch.ones(3)])
    >>> sum(t.routes.values())
    1
    """
    before = counts()
    result = Trace()
    try:
        yield result
    finally:
        after = counts()
        result.routes = {f: after[f] - before[f] for f in FAMILIES if after[f] != before[f]}
        result.casts = after["cast"] - before["cast"]
