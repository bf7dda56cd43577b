"""A copy of the tree in which every check can be taken out by name, in Python and in C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import cpp_sites, python_sites
from .python_sites import Site

__all__ = ["CPP", "PYTHON", "make"]

ROOT = Path(__file__).resolve().parent.parent.parent

# The check stage: between what a caller says and the first write.
PYTHON = (
    "backend/checks.py", "backend/native.py", "before.py", "casting.py", "destinations.py", "fills.py",
    "hooks.py", "judge.py", "lists.py", "loading.py", "localize.py", "patterns.py", "plan.py",
    "proof.py", "resolve.py", "rules.py", "shapes.py", "sheets.py", "stacking.py",
    "templates.py", "writes.py",
)  # fmt: skip
CPP = (
    "batch.cpp", "operators.cpp", "plan.cpp", "python_ops.cpp", "recorder.cpp", "tensors.cpp",
)  # fmt: skip

_KEPT = '''"""Which check is taken out."""
import os

def keep(site):
    path = os.environ.get("PARAMKIT_CHECK_HITS")
    if path:
        with open(path, "a") as file:
            file.write(site + "\\n")
    return os.environ.get("PARAMKIT_CHECK_REMOVED") != site
'''


def make(folder: Path, build: bool) -> list[Site]:
    """Copy the tree into a folder and rewrite it there; the checks.

    C++ takes part only if it is built; else the copy has the extension of this tree.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    sites: list[Site] = []
    for name in PYTHON:
        path = folder / "paramkit" / name
        text, found = python_sites.rewrite(f"paramkit/{name}", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
        sites += found
    (folder / "paramkit" / "_kept.py").write_text(_KEPT, encoding="utf-8")
    for name in CPP if build else ():
        path = folder / "csrc" / "torch" / name
        text, found = cpp_sites.rewrite(f"csrc/torch/{name}", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
        sites += found
    (folder / "csrc" / "core" / "kept.h").write_text(cpp_sites.HEADER, encoding="utf-8")
    if build:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {"PARAMKIT_CUDA": "off", "PARAMKIT_BUILD": "require"}
        subprocess.run(command, cwd=folder, check=True, env={**_environment(), **environment})
    else:
        for binary in (ROOT / "paramkit").glob("_C.*"):
            shutil.copyfile(binary, folder / "paramkit" / binary.name)
    return sites


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PARAMKIT_")}
