"""Many lists on several processes. One that a crash ends is looked into by others."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.emulation import ROOT
from tests.fuzz import generate
from tests.fuzz.run import Failure, Result, Runner, program_of

__all__ = ["Job", "run_shards", "work"]

MOST_FAILURES = 3
"""Failures after which a process stops: more of them are mostly the same one."""


@dataclass(frozen=True)
class Job:
    """What a process does: the blocks `shard`, `shard + shards`, ... until it has done its lists."""

    seed: int
    lists: int  # of this process
    backends: tuple[str, ...]
    shard: int = 0
    shards: int = 1
    emulator: str = ""
    emulate_every: int = 1
    seconds: float = float("inf")
    first: int = 0  # block


def work(job: Job, progress: Path | None = None, say: bool = False) -> Result:
    """Run blocks in this process."""
    runner = Runner(
        job.backends, Path(job.emulator) if job.emulator else None, job.emulate_every, progress
    )
    total = Result()
    number, begin = job.first + job.shard, time.monotonic()
    said = begin
    while total.lists < job.lists and time.monotonic() - begin < job.seconds:
        total.add(runner.run_block(job.seed, number))
        if len(total.failures) >= MOST_FAILURES:
            break
        number += job.shards
        if say and time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"shard {job.shard}: {total.lists:,} lists", flush=True)
    for failure in total.failures[:MOST_FAILURES]:
        runner.explain(failure)
    return total


def _arguments(job: Job, *more: str) -> list[str]:
    return [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.fuzz",
        "--job",
        json.dumps(job.__dict__),
        *more,
    ]


def _crashes(job: Job, name: str, kept: Sequence[int]) -> bool:
    writes = ",".join(map(str, kept))
    done = subprocess.run(
        _arguments(job, "--one", name, "--keep", writes), cwd=ROOT, capture_output=True, check=False
    )
    return done.returncode < 0


def _crash(job: Job, progress: Path, status: int) -> Failure:
    """What a process was at when a signal ended it, with as few writes as still do."""
    number, backend, index = struct.unpack("<qqq", progress.read_bytes())
    what = f"ended by {signal.Signals(-status).name}"
    if backend < 0:
        return Failure(f"{job.seed}:{number}:0", "torch", what)
    name = f"{job.seed}:{number}:{index}"
    failure = Failure(name, job.backends[backend], what)
    each = generate.block(job.seed, number)[index]
    alone = replace(job, backends=(failure.backend,))
    kept = list(range(len(each.writes)))
    if _crashes(alone, name, kept):
        for write in list(kept):
            fewer = [one for one in kept if one != write]
            if fewer and _crashes(alone, name, fewer):
                kept = fewer
    failure.program = program_of(replace(each, writes=[each.writes[w] for w in kept]), failure)
    return failure


def run_shards(jobs: Sequence[Job], say: bool = False) -> Result:
    """Run each job in a process of its own, all at once."""
    total = Result()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = []
        for at, job in enumerate(jobs):
            out, progress = folder / f"{at}.json", folder / f"{at}.progress"
            more = ["--out", str(out), "--progress", str(progress)] + (["--say"] if say else [])
            # Threads that wait leave the processors to the other processes.
            environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
            process = subprocess.Popen(_arguments(job, *more), cwd=ROOT, env=environ)
            running.append((process, job, out, progress))
        try:
            for process, job, out, progress in running:
                status = process.wait()
                if status < 0:
                    total.failures.append(_crash(job, progress, status))
                elif status:
                    raise RuntimeError(f"a process of the fuzz ended with {status}: {job}")
                else:
                    total.add(Result.from_json(out.read_text()))
        finally:
            for process, *_ in running:
                process.kill()
                process.wait()
    return total
