"""What a process holds, measured to the byte where that can be done, and whether it grows."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

__all__ = ["Growth", "Held", "growth", "quick_collections"]


@contextmanager
def quick_collections() -> Iterator[None]:
    """The garbage collector looks at what is made from now on: at all that torch has made it takes 0.1 s a time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                 "keepcost")]  # fmt: skip


def _malloc_bytes() -> int:
    """Bytes that malloc has given out: C++ objects, tensors, large Python objects. 0 without glibc 2.33."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def _resident_bytes() -> int:
    # statm is not exact: the kernel counts in batches.
    found = re.search(
        r"^Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE
    )
    assert found
    return int(found[1]) * 1024


@dataclass
class Held:
    """What this process holds now.

    Attributes:
        resident: bytes of memory.
        malloc: bytes that malloc has given out.
        blocks: memory blocks of Python's small objects: a tuple is one.
        files: open files.
        threads: of the process.
    """

    resident: int
    malloc: int
    blocks: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        return cls(
            _resident_bytes(),
            _malloc_bytes(),
            sys.getallocatedblocks(),
            len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            len(os.listdir("/proc/self/task")),  # noqa: PTH208
        )


@dataclass
class Growth(Held):
    """How much more is held after some cycles."""

    cycles: int

    def assert_flat(self, least: float = 0.25) -> None:
        """Less than `least` small objects a cycle, and less than 8 bytes of C++ memory."""
        assert self.blocks < self.cycles * least + 10, self
        assert self.malloc < 8 * self.cycles + (16 << 10), self
        assert self.resident < max(24 * self.cycles, 256 << 10), self
        assert self.files == self.threads == 0, self


def growth(once: Callable[[], object], cycles: int, tries: int = 4, least: float = 0.25) -> Growth:
    """What `cycles` calls leave behind, after a tenth as many in which caches fill.

    What fills up once is no leak, and may take its time: up to `tries` times it is measured again, and a leak
    is there each time.
    """
    for _ in range(max(cycles // 10, 20)):
        once()
    Held.now()  # imports, and reads files, for the first time
    grown = _measured(once, cycles)
    while tries > 1:
        try:
            grown.assert_flat(least)
            break
        except AssertionError:
            tries -= 1
            grown = _measured(once, cycles)
    return grown


def _measured(once: Callable[[], object], cycles: int) -> Growth:
    before = Held.now()
    for _ in range(cycles):
        once()
    after = Held.now()
    grown = {f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(Held)}
    return Growth(cycles=cycles, **grown)
