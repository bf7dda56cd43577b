"""The GPU as the benchmark sees it: where tensors lie, events, waiting, emptying the cache, graphs.

All else goes through such an object, so that a stand-in can take its place in the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

__all__ = ["GIB", "MIB", "Device", "Gpu", "host_memory"]

MIB = 1024 * 1024
GIB = 1024 * MIB


class Device(Protocol):
    """What the benchmark needs to know of a device, and to ask of it.

    Attributes:
        where: the device that tensors are made on.
        cache: bytes of its last-level cache.
        memory: bytes of its memory.
    """

    where: torch.device
    cache: int
    memory: int

    def now(self) -> int:
        """The host's clock, in nanoseconds."""
        ...

    def mark(self) -> Any:
        """An event, put into the current stream now."""
        ...

    def between(self, first: Any, second: Any) -> float:
        """Nanoseconds from one event to another; both have happened."""
        ...

    def synchronize(self) -> None:
        """Wait until the current stream is empty."""
        ...

    def flush(self) -> None:
        """Put something else into the cache: what a call finds there is not its own."""
        ...

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a graph, captured now; the result replays it."""
        ...

    def forget(self) -> None:
        """Give memory that is no longer used back to the driver."""
        ...


class Gpu:
    """The current CUDA device.

    Raises:
        RuntimeError: torch has none.
    """

    def __init__(self) -> None:
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        self.where = torch.device("cuda", index)
        self.memory = int(properties.total_memory)
        # Torch before 2.3 did not tell; 64 MiB is more than most have.
        self.cache = int(getattr(properties, "L2_cache_size", 0)) or 64 * MIB
        self._other = torch.empty(
            max(256 * MIB, 4 * self.cache), dtype=torch.uint8, device=self.where
        )

    def now(self) -> int:
        return time.perf_counter_ns()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) * 1e6

    def synchronize(self) -> None:
        torch.cuda.current_stream().synchronize()

    def flush(self) -> None:
        self._other.zero_()

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def forget(self) -> None:
        torch.cuda.empty_cache()


def host_memory() -> int:
    """Bytes of host memory that are free, as far as the system tells; else 16 GiB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 16 * GIB
