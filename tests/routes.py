"""Which route a backend is expected to take."""

from __future__ import annotations

__all__ = ["TRANSFERS", "routes_of"]

TRANSFERS = ("cuda:to device", "cuda:to host")
"""Backends on which the two sides of a copy stand for different memories."""


def routes_of(backend: str, **families: int) -> dict[str, int]:
    """The routes of copies that the kernels do, by family.

    >>> routes_of("cpu:avx2", copy=2, rows=1)
    {'copy': 2, 'rows': 1}
    >>> routes_of("native", copy=2, rows=1)
    {'native': 3}
    """
    if backend == "native":
        return {"native": sum(families.values())}
    if backend in TRANSFERS:
        return {"staged": sum(families.values())}
    return families
