"""Temporary memory of a case: the growth of a process's peak while it runs once.

`measure` starts ``python -m benchmarks.memory NAME``, which makes the inputs, touches every page, runs
a tiny copy of the case for what is loaded lazily, resets the kernel's high-water mark, and runs
the case once. Two figures come back, and the larger one counts:

* what torch's CPU allocator gave out meanwhile, exact to the byte;
* the growth of the peak over what was resident, whoever allocated it. The kernel counts pages of many
  threads lazily, so growth below `RESOLUTION` counts as none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

__all__ = ["RESOLUTION", "Found", "measure"]

RESOLUTION = 1024 * 1024
"""Bytes; a temporary copy of the inputs would be 512 times as much."""

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Found:
    """Bytes of temporary memory of both sides, what the parts were, and the bytes moved."""

    bytes: int
    paramkit: int
    torch: int
    peak_growth: int
    allocated: int
    resolution: int = RESOLUTION


def measure(name: str, tiny: bool = False) -> Found:
    """The temporary memory of the case `name`, measured in a process of its own.

    Raises:
        RuntimeError: the process failed; its last line says why.
    """
    command = [sys.executable, "-m", "benchmarks.memory", name, *(["--tiny"] if tiny else [])]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return Found(**json.loads(done.stdout))


def _resident(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {key}: temporary memory is measured on Linux only")


def _peak_growth(call: Callable[[], object]) -> int:
    _RESET.write_text("5")  # the high-water mark becomes what is resident now
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _allocated(call: Callable[[], object]) -> int:
    """Bytes that torch's allocator gave out, freed again or not."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    # The records themselves: in the profiler's tables what an operator frees again is taken off.
    records = profile.profiler.kineto_results.events()
    return sum(max(0, record.nbytes()) for record in records if record.name() == "[memory]")


def _main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("name", help="a case of the group memory")
    parser.add_argument("--tiny", action="store_true", help="tiny inputs, to test this file")
    options = parser.parse_args(arguments)

    from benchmarks.cases import CASES

    case = next(case for case in CASES if case.name == options.name)
    with torch.no_grad():
        small, work = case.make(True), case.make(options.tiny)
        for dst in work.dsts:
            dst.zero_()
        small.ours()
        small.peer()
        _allocated(small.ours)
        growth = [_peak_growth(side) for side in (work.ours, work.peer)]
        allocated = [_allocated(side) for side in (work.ours, work.peer)]
    used = [
        max(given, grown if grown >= RESOLUTION else 0)
        for given, grown in zip(allocated, growth, strict=True)
    ]
    found = Found(work.bytes, used[0], used[1], growth[0], allocated[0])
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
