"""Builds the CUDA library without CUDA: the kernels' own source as C++, behind a shim."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A load or store that is not aligned is an error on a GPU, and of no consequence here: the sanitizer makes
# it one here too.
FLAGS = (
    *(
        "-std=c++17",
        "-O2",
        "-g0",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
    ),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
    *("-fsanitize=alignment,shift,bounds", "-fsanitize-undefined-trap-on-error"),
)


def compiler() -> list[str]:
    """The C++ compiler, as for the extension."""
    return shlex.split(os.environ.get("CXX") or "c++")


def build(folder: Path, *flags: str) -> Path:
    """Compile into the folder, with further flags; the library's path."""
    library = folder / "emulator.so"
    csrc = ROOT / "csrc"
    command = [
        *compiler(),
        *FLAGS,
        *flags,
        f"-I{csrc}",
        str(csrc / "tests" / "emulate.cpp"),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return library
