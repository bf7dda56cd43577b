"""The limits of a GPU: the best large copy on the device, the best transfer from and to pinned memory.

A copy counts the bytes read and written, a transfer those that cross the bus. Both are measured before
the cases and once more after them; the best median is the limit.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch

import paramkit

from .clocks import Side
from .device import GIB, MIB, Device
from .registry import LIMITS, Call

__all__ = ["ROUNDS", "Limits"]

ROUNDS = 12


class Limits:
    """What was measured in this run.

    Args:
        sizes: bytes that a copy writes; the tests use less than a GiB.
    """

    def __init__(self, gpu: Device, sizes: tuple[int, ...] = (GIB, 2 * GIB)) -> None:
        self._gpu = gpu
        self._sizes = sizes
        self._best: dict[str, dict[str, object]] = {}

    def measure(self, what: str) -> None:
        """Time the candidates for one of `LIMITS`, and keep the best of all so far."""
        for name, call, size in self._candidates(what):
            side = Side(name, call, self._gpu, "events", size)
            side.prepare()
            speeds = [size / side.sample() for _ in range(ROUNDS)]
            low, middle, high = statistics.quantiles(speeds, n=4, method="inclusive")
            known = self.gbs(what)
            if known is None or middle > known:
                self._best[what] = {
                    "loop": name,
                    "gbs": round(middle, 3),
                    "gbs_q1": round(low, 3),
                    "gbs_q3": round(high, 3),
                    "samples": len(speeds),
                }
        self._gpu.forget()

    def gbs(self, what: str | None) -> float | None:
        """In GB/s; None if it was not measured."""
        found = self._best.get(what or "")
        return float(str(found["gbs"])) if found else None

    def as_dict(self) -> dict[str, object]:
        """Plain data for the result, with the keys of `benchmarks.limits`."""
        return {"bytes": max(self._sizes), "fill": None} | {
            what: self._best.get(what) for what in LIMITS
        }

    def _candidates(self, what: str) -> Iterator[tuple[str, Call, int]]:
        where = self._gpu.where
        for size in self._sizes if what == "copy" else self._sizes[:1]:
            text = f"{size // MIB} MiB" if size >= MIB else f"{size} bytes"
            here = torch.ones(size, dtype=torch.uint8, device=where)
            if what == "copy":
                other = torch.zeros_like(here)
                yield f"copy_, {text}", partial(other.copy_, here), 2 * size
                yield f"paramkit.copy_, {text}", partial(paramkit.copy_, other, here), 2 * size
                continue
            pinned = torch.ones(size, dtype=torch.uint8, pin_memory=where.type == "cuda")
            to, source = (here, pinned) if what == "to_device" else (pinned, here)
            yield f"pinned copy_, {text}", partial(to.copy_, source, non_blocking=True), size
