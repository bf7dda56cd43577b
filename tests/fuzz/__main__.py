"""`make fuzz`: lists of writes on every backend against torch, then the C++ core against plain loops.

python -m tests.fuzz --lists 1000000 --seed 7         # on all backends
python -m tests.fuzz --one 7:12:30 --backend cpu:avx2 # one list again: a smaller one, as a program
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests import emulation
from tests.conftest import EMULATED
from tests.emulation import ROOT
from tests.fuzz import core, generate
from tests.fuzz.run import Failure, Runner, available
from tests.fuzz.shards import Job, run_shards, work


def fuzz_core(seconds: int, seed: int) -> int:
    """libFuzzer if there is one, else the driver of our own; the exit status."""
    folder = ROOT / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    clang = core.libfuzzer()
    if clang:
        command = [core.build_libfuzzer(folder, clang), f"-max_total_time={seconds}"]
        command += [f"-seed={seed + 1}", "-max_len=400"]
    else:
        command = [core.build(folder), "--seconds", str(seconds), "--seed", str(seed)]
    print(" ".join(map(str, command)), flush=True)
    return subprocess.run([*map(str, command)], cwd=folder, check=False).returncode


def fuzz_lists(args: argparse.Namespace) -> int:
    backends = [*args.backend] or [*available(), *EMULATED]
    if available() == ["native"]:
        backends = [name for name in backends if name == "native"]
    with tempfile.TemporaryDirectory() as folder:
        emulated = any(name in EMULATED for name in backends)
        job = Job(
            seed=args.seed,
            lists=-(-args.lists // args.processes),
            backends=tuple(backends),
            shards=args.processes,
            emulator=str(emulation.build(Path(folder))) if emulated else "",
            emulate_every=args.emulate_every,
            seconds=args.seconds,
            first=args.first_block,
        )
        begin = time.monotonic()
        result = run_shards([replace(job, shard=i) for i in range(args.processes)], say=True)
    print(f"{result.lists:,} lists, {result.writes:,} writes, {time.monotonic() - begin:.0f} s")
    print(
        f"  refused by torch {result.errors:,}; plans {result.plans:,}, refused {result.refused:,}"
    )
    print("  " + ", ".join(f"{kind} {n:,}" for kind, n in sorted(result.kinds.items())))
    print(f"  written by several threads {result.parallel:,}")
    for backend, runs in result.runs.items():
        scales = ", ".join(f"{runs[scale]:,} {scale}" for scale in generate.SCALES)
        print(f"  {backend}: {runs.total():,} lists, {scales}")
    for name, counts in result.routes.items():
        routes = ", ".join(f"{family} {n:,}" for family, n in counts.items() if n)
        print(f"  writes, {name}: {routes}")
    for failure in result.failures:
        print(f"\n{failure.name} on {failure.backend}: {failure.what}\n\n{failure.program}")
    return 1 if result.failures else 0


def again(name: str, job: Job, keep: str) -> int:
    """One list: what differs, as a program."""
    seed, number, index = map(int, name.split(":"))
    runner = Runner(job.backends, Path(job.emulator) if job.emulator else None)
    status = 0
    for backend in job.backends:
        each = generate.block(seed, number)[index]
        if keep:
            each = replace(each, writes=[each.writes[int(w)] for w in keep.split(",")])
        what = runner.one(each, backend, number)
        status |= bool(what)
        print(f"{name} on {backend}: {what or 'as torch'}")
        if what and not keep:
            failure = Failure(name, backend, what)
            runner.explain(failure)
            print(failure.program)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    add = parser.add_argument
    add("--lists", type=int, default=2_000_000, help="how many; 0: none, the C++ core alone")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=float("inf"), help="at most, for the lists")
    add("--processes", type=int, default=os.cpu_count() or 1)
    add("--backend", action="append", default=[], help="all if not given; may be repeated")
    add(
        "--emulate-every", type=int, default=11, help="blocks of which one goes to the emulated GPU"
    )
    add("--first-block", type=int, default=0)
    add("--core-seconds", type=int, default=60, help="for the C++ core; 0: none")
    add("--one", default="", metavar="SEED:BLOCK:LIST", help="one list again")
    hidden = {"help": argparse.SUPPRESS}  # for the processes that this one starts
    add("--job", default="", **hidden)
    add("--out", type=Path, **hidden)
    add("--progress", type=Path, **hidden)
    add("--keep", default="", **hidden)
    add("--say", action="store_true", **hidden)
    args = parser.parse_args()
    if args.job:
        data = json.loads(args.job)
        job = Job(**{**data, "backends": tuple(data["backends"])})
        if args.one:
            return again(args.one, job, args.keep)
        args.out.write_text(work(job, args.progress, args.say).to_json())
        return 0
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            backends = tuple(args.backend or [*available(), *EMULATED])
            emulator = str(emulation.build(Path(folder))) if set(backends) & set(EMULATED) else ""
            return again(args.one, Job(0, 0, backends, emulator=emulator), "")
    status = fuzz_lists(args) if args.lists else 0
    if args.core_seconds:
        status |= fuzz_core(args.core_seconds, args.seed)
    return status


if __name__ == "__main__":
    sys.exit(main())
