"""Compiles `plain.c` on first use into a cache folder, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["NoCompilerError", "compiled"]

SOURCE = Path(__file__).with_name("plain.c")
FLAGS = ("-O3", "-fPIC", "-shared", "-pthread")


class NoCompilerError(RuntimeError):
    """The plain C code cannot be compiled here; columns that need it stay empty."""


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path.home() / ".cache"
    folder = home / "paramkit-benchmarks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="paramkit-benchmarks-"))


def _compile(command: list[str], target: Path) -> None:
    # Into a name of its own first: another process may be compiling the same file.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode != 0:
            raise NoCompilerError(f"{command[0]} cannot compile {SOURCE.name}: {done.stderr[:500]}")
        made.replace(target)


@cache
def compiled() -> ctypes.CDLL:
    """The compiled `plain.c`; torch must be imported already, for its threads to be found.

    Raises:
        NoCompilerError: there is no C compiler (`CC`, else `cc`), or it fails.
    """
    compiler = os.environ.get("CC") or "cc"
    if shutil.which(compiler.split()[0]) is None:
        raise NoCompilerError(
            f"no C compiler: {compiler!r} is not there; set CC, or go without the limit's columns"
        )
    command = [*compiler.split(), *FLAGS, str(SOURCE)]
    version = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True
    ).stdout.partition("\n")[0]
    key = hashlib.sha256(
        SOURCE.read_bytes() + f"{command} {version} {platform.machine()}".encode()
    ).hexdigest()[:16]
    target = _folder() / f"plain-{key}.so"
    if not target.exists():
        _compile(command, target)
    loaded = ctypes.CDLL(str(target))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    loaded.plain_has.argtypes = (number,)
    loaded.plain_copy.argtypes = (number, pointer, pointer, size, number, number, number)
    loaded.plain_copy.restype = None
    loaded.plain_fill.argtypes = (number, pointer, number, size, number, number, number)
    loaded.plain_fill.restype = None
    loaded.plain_compare.argtypes = (number, pointer, pointer, size, number, number, number)
    loaded.plain_pairs.argtypes = (pointer, pointer, *[size] * 5, pointer, number)
    loaded.plain_pairs.restype = None
    return loaded
