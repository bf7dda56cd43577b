"""The CUDA toolkit of this machine: where nvcc is, its version, the architectures to compile for.

Nothing here asks for a GPU: what is built depends on the toolkit alone. setup.py loads this file
by path, before paramkit or torch can be imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

DEFAULT_HOME = Path("/usr/local/cuda")
# Where nvcc is looked for, in words.
PLACES = f"CUDA_HOME, CUDA_PATH, PATH and {DEFAULT_HOME}"
# Turing: the oldest that every toolkit from 12.4 on compiles for without a warning.
OLDEST = 75

_TARGET = re.compile(r"-gencode=arch=compute_\w+,code=(sm|compute)_(\w+)")
# In a process of its own: setup.py's must do without torch, and torch reads the variable by itself.
_ASK_TORCH = """
import sys
try:
    from torch.utils.cpp_extension import _get_cuda_arch_flags
    print(*_get_cuda_arch_flags())
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class ToolkitError(RuntimeError):
    """nvcc does not answer, or the architectures asked for are none that torch knows."""


def find_nvcc(environ: os._Environ[str] | dict[str, str] = os.environ) -> Path | None:
    """nvcc by ``CUDA_HOME``, ``CUDA_PATH``, ``PATH``, or where its installer puts it."""
    homes = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    paths = [str(home / "bin") for home in homes]
    paths += [environ.get("PATH") or "", str(DEFAULT_HOME / "bin")]
    found = shutil.which("nvcc", path=os.pathsep.join(path for path in paths if path))
    return Path(found) if found else None


def version(nvcc: Path) -> str:
    """The version of nvcc, as in ``13.0.88``.

    Raises:
        ToolkitError: if it does not tell.
    """
    found = re.search(r"\bV(\d+(?:\.\d+)+)", _ask([str(nvcc), "--version"]))
    if not found:
        raise ToolkitError(f"{nvcc} --version names no version")
    return found.group(1)


def targets(nvcc: Path, environ: os._Environ[str] | dict[str, str] = os.environ) -> list[str]:
    """nvcc's flags that name the architectures.

    With ``TORCH_CUDA_ARCH_LIST`` set, those that torch makes of it, as for any other extension of
    torch. Otherwise machine code for each that this nvcc knows, from 7.5 on, and PTX of the newest,
    from which a driver compiles for GPUs that come later.

    Raises:
        ToolkitError: if torch knows no such architecture, or nvcc does not tell.
    """
    wanted = environ.get("TORCH_CUDA_ARCH_LIST") or ""
    if wanted.strip():
        return _targets_of_torch(wanted, environ)
    # Without 90a, 100f and the like: code for those runs nowhere else.
    listed = re.findall(r"^compute_(\d+)\s*$", _ask([str(nvcc), "--list-gpu-arch"]), re.MULTILINE)
    numbers = sorted({int(number) for number in listed if int(number) >= OLDEST})
    if not numbers:
        raise ToolkitError(f"{nvcc} --list-gpu-arch names none from {OLDEST} on")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def architectures(flags: Iterable[str]) -> list[str]:
    """The architectures that flags name, in order: ``75`` for machine code, ``121+PTX`` for PTX."""
    found = [match.groups() for match in map(_TARGET.fullmatch, flags) if match]
    names = {name if kind == "sm" else f"{name}+PTX" for kind, name in found}
    return sorted(names, key=lambda name: (int(re.sub(r"\D", "", name)), name))


def covers(built_for: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a library for these architectures runs on a GPU of this compute capability.

    Machine code runs on GPUs of the same major version that are not older, PTX on all that are not
    older. What is for one GPU alone (``90a``) runs on that one.

    >>> covers(["80", "90+PTX"], (8, 6)), covers(["80", "90+PTX"], (12, 0)), covers(["80"], (9, 0))
    (True, True, False)
    """
    major, minor = capability
    for name in built_for:
        number, ptx, _ = name.partition("+PTX")
        if not number.isdecimal():
            if number[:-1] == f"{major}{minor}":
                return True
            continue
        theirs = divmod(int(number), 10)
        if theirs <= (major, minor) and (ptx or theirs[0] == major):
            return True
    return False


def _targets_of_torch(wanted: str, environ: os._Environ[str] | dict[str, str]) -> list[str]:
    try:
        told = _ask([sys.executable, "-c", _ASK_TORCH], environ)
        flags = told.strip().splitlines()[-1].split() if told.strip() else []
    except ToolkitError as error:
        raise ToolkitError(
            f"TORCH_CUDA_ARCH_LIST: got {wanted!r}, which torch makes no architectures of "
            f'({error}). Name some, as in "8.0;9.0+PTX", or unset it for all that nvcc knows'
        ) from None
    if not flags or not all(map(_TARGET.fullmatch, flags)):
        raise ToolkitError(f"TORCH_CUDA_ARCH_LIST: got {wanted!r}, of which torch makes {flags}")
    return flags


def _ask(command: list[str], environ: os._Environ[str] | dict[str, str] | None = None) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(
            command,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolkitError(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ToolkitError(lines[-1] if lines else f"{command[0]} ended with {done.returncode}")
    return done.stdout
