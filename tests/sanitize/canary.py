"""The canaries: what each sanitizer must catch, and what it must not.

``python -m tests.sanitize.canary NAME LIBRARY`` commits one; :func:`check` runs those of a sanitizer, each in a
process of its own.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from paramkit.backend import sources
from tests.sanitize.settings import Sanitizer

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Canary:
    """One mistake. ``caught``: what the report says; empty if there must be none."""

    name: str
    sanitizer: str
    caught: str
    needs: str = "canary.cpp"


CANARIES = (
    Canary("overrun", "address", "heap-buffer-overflow"),
    # Within one storage: not seen here. Python sees it, by the guard bytes, or ends with an error.
    Canary("inside", "address", ""),
    Canary("leak", "address", "canary_leak"),
    *(
        Canary(f"kernel:{name}", "address", " in canary_kernel ", "canary_kernel.cpp")
        for name in ("scalar", "avx2", "avx512")
    ),
    *(
        Canary(f"kernel:{name}:streaming", "address", "use-after-poison", "canary_kernel.cpp")
        for name in ("avx2", "avx512")
    ),
    Canary("overflow", "undefined", "signed integer overflow"),
    Canary("race", "thread", "data race"),
    Canary("parallel:racy", "thread", "data race"),
    # A correct parallel region is no race: else the suite's reports would drown in false ones.
    Canary("parallel", "thread", ""),
)


def check(sanitizer: Sanitizer, library: Path, logs: Path, built: Iterable[str]) -> list[str]:
    """Let loose every canary of a sanitizer at once; what is wrong with the outcomes."""
    started = []
    for canary in CANARIES:
        if canary.sanitizer != sanitizer.name or canary.needs not in built:
            continue
        log = logs / f"canary-{canary.name.replace(':', '-')}"
        for old in logs.glob(f"{log.name}.*"):
            old.unlink()
        command = [*sanitizer.prefix, sys.executable, "-m", "tests.sanitize.canary"]
        process = subprocess.Popen(
            [*command, canary.name, str(library)],
            cwd=ROOT,
            env=sanitizer.process(log),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append((canary, log, process))
    assert started, f"no canary for {sanitizer.name}"
    wrong = []
    for canary, log, process in started:
        output, _ = process.communicate(timeout=900)
        reports = sanitizer.reports(log)
        if "left out" in output and process.returncode == 0:
            continue
        if canary.caught:
            good = process.returncode != 0 and any(canary.caught in text for text in reports)
        else:
            good = process.returncode == 0 and not reports
        if not good:
            what = f"a report with {canary.caught!r}" if canary.caught else "no report"
            wrong.append(
                f"{sanitizer.name}: canary {canary.name}: expected {what}; it ended with status "
                f"{process.returncode} and {len(reports)} reports\n{output}{''.join(reports)}"
            )
    return wrong


def commit(name: str, path: str) -> None:
    """Make the mistake, in this process."""
    kind, _, which = name.partition(":")
    if kind in ("overrun", "inside") or Path(path).name == sources.BINARY_NAME:
        import torch  # first: the extension is linked against it
    library = ctypes.CDLL(path)
    if kind == "overrun":
        storage = torch.zeros(100, dtype=torch.uint8)
        library.canary_overrun(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(100))
    elif kind == "inside":
        _inside(library)
    elif kind == "kernel":
        _kernel(library, which)
    elif kind == "overflow":
        library.canary_overflow(ctypes.c_int32(2**31 - 1))
    elif kind == "race":
        count, arrived = (ctypes.c_int64 * 1)(), (ctypes.c_int32 * 1)()
        arguments = (count, ctypes.c_int64(1000), arrived)
        threads = [
            threading.Thread(target=library.canary_race_of_two, args=arguments) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elif kind == "parallel":
        for turn in range(100):  # the same memory again: every region comes after the one before
            if turn == 0:
                counts = (ctypes.c_int64 * 2)()
            counts[0] = counts[1] = 0
            library.canary_parallel(counts, ctypes.c_int64(1000), ctypes.c_int32(which == "racy"))
            assert which == "racy" or list(counts) == [1000, 1000]
    elif kind == "leak":
        from tests.sanitize import leaks

        library.canary_leak(ctypes.c_int64(4321))
        sys.exit(leaks.check())
    else:
        raise ValueError(f"canary: got {name!r}, expected one of {[one.name for one in CANARIES]}")


def _inside(library: ctypes.CDLL) -> None:
    """One byte past a view, in its storage: the guards tell."""
    import torch

    from tests.guards import Layout, place, watch

    view = place(Layout.dense((40,)), torch.uint8)
    guards = watch(view)
    library.canary_overrun(ctypes.c_void_p(view.data_ptr()), ctypes.c_int64(40))
    try:
        guards.assert_only_inside()
    except AssertionError as error:
        print("the guard bytes tell:", error)
    else:
        sys.exit("the guard bytes did not see it")


def _kernel(library: ctypes.CDLL, which: str) -> None:
    """A kernel sent one byte past a storage, or over a forbidden line in its middle."""
    import torch

    capability, _, streaming = which.partition(":")
    size = 1 << 18
    storage, source = (torch.zeros(n, dtype=torch.uint8) for n in (size, size + 64))
    there = library.canary_kernel(
        capability.encode(),
        ctypes.c_void_p(storage.data_ptr()),
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_int64(size),
        ctypes.c_int32(bool(streaming)),
    )
    if not there:
        print(f"left out: this machine has no {capability}")


if __name__ == "__main__":
    commit(*sys.argv[1:])
