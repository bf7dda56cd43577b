"""Programs to which faults happen on demand: reads and allocations that fail, by a library that is preloaded.

The tests start such a program with `run`; within it, `Faults` says what fails and when.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.emulation import ROOT, compiler

__all__ = ["BROKEN", "INTERRUPTED", "SHORT", "Faults", "build", "run", "run_plain"]

SHORT, INTERRUPTED, BROKEN = 1, 2, 4
_PATH = "PARAMKIT_TEST_FAULTY"


def build(folder: Path) -> Path:
    """Compile the library into the folder; its path."""
    library = folder / "faulty.so"
    command = [*compiler(), "-std=c++17", "-O2", "-g0", "-fPIC", "-shared"]
    command += [str(ROOT / "tests" / "faulty.cpp"), "-o", str(library), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return library


def run_plain(program: str, *arguments: object, **environment: str) -> str:
    """Run a program in a process of its own, which may be killed; what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run(library: Path, program: str, *arguments: object) -> str:
    """As `run_plain`, with the library."""
    settings = {"LD_PRELOAD": str(library), _PATH: str(library)}
    return run_plain(program, *arguments, **settings)


class Faults:
    """What fails in this process, from Python."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[_PATH])
        self._library.faulty_new.argtypes = [ctypes.c_int64, ctypes.c_size_t, ctypes.c_size_t]
        self._library.faulty_aligned.argtypes = [ctypes.c_int64, ctypes.c_size_t]
        self._library.faulty_reads.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int64]
        self._library.faulty_reads_hit.restype = ctypes.c_uint64
        self._library.faulty_reads_seen.restype = ctypes.c_uint64
        self._library.faulty_new_left.restype = ctypes.c_int64
        self._library.faulty_failed.restype = ctypes.c_bool

    @contextmanager
    def reads(self, how: int, seed: int = 0, broken_at: int = -1) -> Iterator[None]:
        """Reads by offset come short, are interrupted, or the one of that number fails with EIO."""
        self._library.faulty_reads(how, seed, broken_at)
        try:
            yield
        finally:
            self._library.faulty_reads(0, 0, -1)

    def hits(self) -> int:
        """How many reads were tampered with since the last `reads` began."""
        return int(self._library.faulty_reads_hit())

    def seen(self) -> int:
        """How many reads there were."""
        return int(self._library.faulty_reads_seen())

    def each_new(self, module: str, most: int = 10_000) -> Iterator[Callable[[], object]]:
        """One after the other, every allocation of a library's own C++ code fails.

        Yields what arms the next one: call it, then what is tried. Ends after the first try that needed no
        more allocations.
        """
        begin, end = _mapped(module)
        yield from self._each(lambda n: self._library.faulty_new(n, begin, end), most)

    def count_new(self, module: str, call: Callable[[], object]) -> int:
        """How many allocations a call needs of a library's own code."""
        self._library.faulty_new(1 << 40, *_mapped(module))
        call()
        left = int(self._library.faulty_new_left())
        self.disarm()
        return (1 << 40) - left

    def each_tensor(self, least: int, most: int = 10_000) -> Iterator[Callable[[], object]]:
        """The same for the memory of tensors of at least so many bytes."""
        yield from self._each(lambda n: self._library.faulty_aligned(n, least), most)

    def disarm(self) -> bool:
        """Let allocations succeed again; whether one has failed."""
        failed = bool(self._library.faulty_failed())
        self._library.faulty_new(-1, 0, 0)
        self._library.faulty_aligned(-1, 0)
        return failed

    def _each(self, arm: Callable[[int], object], most: int) -> Iterator[Callable[[], object]]:
        for n in range(most):
            self._last = False
            yield lambda n=n: arm(n)  # type: ignore[misc]
            if not self._last:
                return
        raise AssertionError(f"more than {most} allocations")

    def failed(self) -> bool:
        """`disarm`, for a loop over `each_new` or `each_tensor`, which goes on as long as it says True."""
        self._last = self.disarm()
        return self._last


def _mapped(module: str) -> tuple[int, int]:
    """Where a library's code is."""
    spans = [
        [int(bound, 16) for bound in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(module) and "x" in line.split()[1]
    ]
    assert spans, f"{module} is not loaded"
    return min(begin for begin, _ in spans), max(end for _, end in spans)
