"""A copy of the checkout whose extension is built with other flags: for sanitizers, and for coverage.

The checkout's own binary is never touched. The copy lies in its ``build`` folder, is brought up to date before
each build, and only what changed is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from paramkit.backend import sources

ROOT = Path(__file__).resolve().parent.parent
# Kept in the copy although the checkout has no such files: what building leaves there.
_BUILT = ("build", "paramkit/_C.", "paramkit/_cuda.so", "paramkit/_build_error.txt")


def files() -> list[Path]:
    """The files of the checkout that git knows or would know, from its root."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(name) for name in done.stdout.split("\0") if name]
    return [path for path in paths if (ROOT / path).is_file() and not (ROOT / path).is_symlink()]


def copy(tree: Path, extra: dict[Path, Path]) -> None:
    """Make the folder a copy of the checkout, with further files: from path to path in the tree."""
    wanted = {path: ROOT / path for path in files()}
    wanted.update({there: path for path, there in extra.items()})
    for there, path in wanted.items():
        copied = tree / there
        # A file with the same content keeps its time, so that nothing is compiled for it.
        if not copied.is_file() or copied.read_bytes() != path.read_bytes():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
            copied.chmod(path.stat().st_mode & 0o777)
    for path in tree.rglob("*"):
        there = path.relative_to(tree)
        if path.is_file() and there not in wanted and not there.as_posix().startswith(_BUILT):
            path.unlink()


def digest(tree: Path) -> str:
    """Of all files of the copy that come from the checkout, their names too."""
    found = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        there = path.relative_to(tree).as_posix()
        made = there.startswith(_BUILT) or "__pycache__" in there
        if path.is_file() and not made:
            found.update(f"{there}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def build(tree: Path, cxxflags: Iterable[str], ldflags: Iterable[str], log: Path) -> Path:
    """Compile the extension in the copy; the binary's path. Its output goes to the log.

    Raises:
        RuntimeError: with the end of the log.
    """
    environ = {
        **os.environ,
        "PARAMKIT_BUILD": "require",
        "PARAMKIT_CUDA": "off",
        "PARAMKIT_CXXFLAGS": shlex.join(cxxflags),
        "LDFLAGS": shlex.join(ldflags),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            command, cwd=tree, env=environ, stdout=out, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise RuntimeError(f"the build in {tree} failed, see {log}:\n{end}")
    return tree / "paramkit" / sources.BINARY_NAME
