"""The packing for the CUDA kernels by itself: a C++ program with sizes that no machine has memory for."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from tests.emulation import ROOT, compiler

CSRC = ROOT / "csrc"


def test_packing(tmp_path: Path) -> None:
    program = tmp_path / "pack_test"
    sources = [CSRC / "tests" / "pack_test.cpp"]
    sources += [CSRC / "cuda" / name for name in ("pack.cpp", "buckets.cpp")]
    sources += sorted((CSRC / "core").glob("*.cpp"))
    flags = ["-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover", f"-I{CSRC}"]
    command = [*compiler(), *flags, *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    run = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stdout + run.stderr
