"""`make fuzz`: the C++ core against plain loops, with sanitizers, for some seconds."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.emulation import ROOT
from tests.fuzz import core


def fuzz_core(seconds: int, seed: int) -> int:
    """libFuzzer if there is one, else the driver of our own; the exit status."""
    if seconds <= 0:
        return 0
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core-seconds", type=int, default=60)
    args = parser.parse_args()
    return fuzz_core(args.core_seconds, args.seed)


if __name__ == "__main__":
    sys.exit(main())
