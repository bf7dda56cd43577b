"""Streams that are busy for a while, and memory that is used again at once: what shows a missing order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capture", "churn", "delay"]


def delay(milliseconds: int) -> None:
    """Keep the current stream busy, about so long; the call returns at once."""
    torch.cuda._sleep(milliseconds * 1_800_000)


def churn(device: torch.device, largest: int = 1 << 20) -> None:
    """Take the memory that was freed last, in every size, and write zeros to it on the current stream.

    A packet of zeros tells a kernel to do nothing, so that a stale one shows as a missing write.
    """
    size, held = 512, []
    while size <= largest:
        held += [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(8)]
        size *= 2


def capture(call: Callable[[], object], **options: Any) -> torch.cuda.CUDAGraph:
    """A graph of what the call puts into the current stream."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        call()
    return graph
