"""A copy of the tree in which every check can be taken out by name, in Python and in C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import cpp_sites, python_sites
from .python_sites import Site

__all__ = ["CPP", "ELSEWHERE", "PYTHON", "make", "sites_of"]

ROOT = Path(__file__).resolve().parent.parent.parent

# The check stage: between what a caller says and the first write; of an iterable, before each write.
PYTHON = (
    "backend/checks.py", "backend/claims.py", "backend/native.py", "backend/staging.py", "before.py", "casting.py",
    "destinations.py", "dropin.py", "execution.py", "fills.py", "hooks.py", "iterate.py", "judge.py",
    "list_plan.py", "lists.py", "loading.py", "localize.py", "model_plan.py", "ops.py", "options.py", "patterns.py",
    "plan.py", "planning.py", "proof.py", "resolve.py", "rules.py", "shapes.py", "sheets.py", "stacking.py",
    "stream.py", "templates.py", "writes.py",
)  # fmt: skip
CPP = (
    "batch.cpp", "claims.cpp", "devices.cpp", "held_claim.cpp", "operators.cpp", "patch.cpp", "plan.cpp",
    "python_ops.cpp", "recorder.cpp", "tensors.cpp", "transfer.cpp",
)  # fmt: skip
# Files and folders whose refusals are of another kind. Whatever else refuses something is in the lists above.
ELSEWHERE = {
    "backend/build.py": "builds",
    "backend/compile.py": "builds",
    "backend/compile_cuda.py": "builds",
    "backend/cuda.py": "which library is loaded",
    "backend/loader.py": "which backend is loaded",
    "backend/sources.py": "builds",
    "backend/toolkit.py": "builds",
    "cli": "commands",
    "compare.py": "writes nothing",
    "demo": "commands",
    "distributed": "several ranks",
    "fingerprint.py": "writes nothing",
    "output.py": "files",
    "recipes": "files",
    "rulefile.py": "files",
    "sharding.py": "several ranks",
    "sources": "files",
    "module.cpp": "which backend is used",
}

_KEPT = '''"""Which check is taken out."""
import os

def keep(site):
    path = os.environ.get("PARAMKIT_CHECK_HITS")
    if path:
        with open(path, "a") as file:
            file.write(site + "\\n")
    return os.environ.get("PARAMKIT_CHECK_REMOVED") != site
'''


def _rewritten(python: Iterable[str], cpp: Iterable[str]) -> Iterator[tuple[str, str, list[Site]]]:
    """The path of each file, its text with every check behind a question, and the checks."""
    for name in python:
        path = f"paramkit/{name}"
        yield path, *python_sites.rewrite(path, (ROOT / path).read_text(encoding="utf-8"))
    for name in cpp:
        path = f"csrc/torch/{name}"
        yield path, *cpp_sites.rewrite(path, (ROOT / path).read_text(encoding="utf-8"))


def sites_of(python: Iterable[str] = PYTHON, cpp: Iterable[str] = CPP) -> list[Site]:
    """The checks of these files."""
    return [site for _, _, found in _rewritten(python, cpp) for site in found]


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
    for path, text, found in _rewritten(PYTHON, CPP if build else ()):
        (folder / path).write_text(text, encoding="utf-8")
        sites += found
    (folder / "paramkit" / "_kept.py").write_text(_KEPT, encoding="utf-8")
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
