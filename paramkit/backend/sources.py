"""What the extension is made of: C++ sources, flags, the hash that names a build, the record.

setup.py loads this file by path, before paramkit or torch can be imported, so it imports nothing
but the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).resolve().parent.parent
RECORD_NAME = "_C.json"
ERROR_NAME = "_build_error.txt"
# The tag in the binary's file name: interpreter, version, platform. A binary without this very
# suffix cannot be imported by this interpreter.
PYTHON_TAG = importlib.machinery.EXTENSION_SUFFIXES[0]
BINARY_NAME = "_C" + PYTHON_TAG
# The CUDA library, beside the binary. It knows neither torch nor Python, so its name has no tag.
CUDA_NAME = "_cuda.so"

BUILD_MODES = ("auto", "require", "off")
# Folders below csrc that are no part of the extension: tests of the C++ core are programs of
# their own.
_SEPARATE = ("tests",)
_SOURCE_SUFFIXES = (".cpp", ".cc", ".c", ".h", ".hpp", ".inc", ".inl", ".cu", ".cuh")

# What a record holds, and its entry on the CUDA library; any of it may be missing.
_ENTRIES = {
    **dict.fromkeys(("result", "torch", "python", "source_hash", "sha256", "compiler"), str),
    **dict.fromkeys(("time", "log"), str),
    "flags": list,
    "cuda": dict,
}
_CUDA_ENTRIES = {
    **dict.fromkeys(("result", "reason", "toolkit", "arch_list", "inputs", "sha256"), str),
    "architectures": list,
    "werror": bool,
    "kernels": dict,
}


def csrc_dir() -> Path | None:
    """Folder of the C++ sources: beside the package in a checkout, inside it in a wheel.

    Returns:
        The folder, or None if this installation has no sources.
    """
    for folder in (PACKAGE_DIR.parent / "csrc", PACKAGE_DIR / "csrc"):
        if folder.is_dir():
            return folder
    return None


def cpp_sources(csrc: Path) -> list[Path]:
    """The files to compile, in a fixed order so that two builds are the same build."""
    return sorted(
        path for path in csrc.rglob("*.cpp") if path.relative_to(csrc).parts[0] not in _SEPARATE
    )


def compile_flags(environ: os._Environ[str] | dict[str, str] = os.environ) -> list[str]:
    """Flags for every C++ source. ``DEBUG=1`` and ``PARAMKIT_WERROR=1`` are honoured.

    ``PARAMKIT_CXXFLAGS`` comes last, so that it wins over all others (``CFLAGS`` come first): the
    sanitizers' builds are made with it.

    No ``-std``: torch's build tool adds the one that its headers need. No ``-march=native``: the
    binary must run on any machine of the platform; each instruction set has a file that enables
    its own target.
    """
    flags = ["-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if _is_on(environ.get("DEBUG")):
        # Python's own flags hold -DNDEBUG, which would switch assertions off.
        flags += ["-O0", "-g", "-UNDEBUG"]
    else:
        # Python's own flags may hold -g, which makes the binary ten times larger.
        flags += ["-O3", "-g0"]
    if _is_on(environ.get("PARAMKIT_WERROR")):
        flags.append("-Werror")
    return flags + shlex.split(environ.get("PARAMKIT_CXXFLAGS") or "")


def link_flags() -> list[str]:
    """Link flags. torch ships libgomp.so.1 under its usual name: one OpenMP runtime, one pool."""
    return ["-fopenmp"]


def nvcc_flags(environ: os._Environ[str] | dict[str, str] = os.environ) -> list[str]:
    """Flags for the CUDA library, but for the architectures. ``PARAMKIT_WERROR=1`` is honoured.

    The CUDA runtime is linked in, so that the library needs nothing but the driver. Never
    ``--use_fast_math``: conversions must give torch's bits. ``-Xptxas -v`` prints what the kernels
    take, which goes into the record.
    """
    flags = ["-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xptxas", "-v"]
    host = "-fPIC,-Wall,-Wextra,-fvisibility=hidden"
    if _is_on(environ.get("PARAMKIT_WERROR")):
        flags += ["--Werror", "all-warnings"]
        host += ",-Werror"
    return [*flags, "-Xcompiler", host]


def jobs(environ: os._Environ[str] | dict[str, str] = os.environ) -> int:
    """How many things are compiled at once: ``MAX_JOBS``, else as many as there are cores."""
    wanted = environ.get("MAX_JOBS") or ""
    return int(wanted) if wanted.isdecimal() and int(wanted) else os.cpu_count() or 1


def build_mode(environ: os._Environ[str] | dict[str, str] = os.environ) -> str:
    """The value of ``PARAMKIT_BUILD``: ``auto`` (default), ``require`` or ``off``.

    Raises:
        ValueError: for any other value.
    """
    return _mode(
        environ,
        "PARAMKIT_BUILD",
        "auto: install without the extension if it cannot be built; require: fail; off: do not build",
    )


def cuda_mode(environ: os._Environ[str] | dict[str, str] = os.environ) -> str:
    """The value of ``PARAMKIT_CUDA``: ``auto`` (default), ``require`` or ``off``.

    Raises:
        ValueError: for any other value.
    """
    return _mode(
        environ,
        "PARAMKIT_CUDA",
        "auto: build the CUDA library if there is an nvcc; require: fail without it; off: do not build it",
    )


def _mode(environ: os._Environ[str] | dict[str, str], name: str, meanings: str) -> str:
    mode = environ.get(name) or "auto"
    if mode not in BUILD_MODES:
        raise ValueError(
            f"{name}: got {mode!r}, expected one of {', '.join(BUILD_MODES)} ({meanings})"
        )
    return mode


def source_hash(csrc: Path, torch_version: str) -> str:
    """16 hex digits over everything that a binary depends on.

    That is: every source file's name and content, the release flags, the torch version and the
    Python tag. Flags that only help debugging stay out, so that the hash which a later process
    computes does not depend on its environment.
    """
    digest = hashlib.sha256()
    parts = [*compile_flags({}), *link_flags(), *nvcc_flags({}), torch_version, PYTHON_TAG]
    digest.update("\0".join(parts).encode())
    for path in sorted(csrc.rglob("*")):
        if path.suffix in _SOURCE_SUFFIXES and path.is_file():
            digest.update(b"\0" + path.relative_to(csrc).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_whole(path: Path, digest: object) -> bool:
    """Whether a file is there, can be read, and has this SHA-256."""
    try:
        return path.is_file() and digest == file_digest(path)
    except OSError:
        return False


def cache_dir(torch_version_module: Any) -> Path:
    """paramkit's folder in torch's extension cache.

    The same place as torch.utils.cpp_extension would choose, worked out here because importing
    that module takes longer than the whole of paramkit.

    Args:
        torch_version_module: ``torch.version``.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root) / "paramkit"
    if sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if getattr(torch_version_module, "hip", None):
        accelerator = "rocm" + torch_version_module.hip.replace(".", "")
    elif torch_version_module.cuda:
        accelerator = "cu" + torch_version_module.cuda.replace(".", "")
    else:
        accelerator = "cpu"
    abi = getattr(sys, "abiflags", "")
    tag = f"py{sys.version_info.major}{sys.version_info.minor}{abi}_{accelerator}"
    return caches / "torch_extensions" / tag / "paramkit"


def read_record(path: Path) -> dict[str, Any] | None:
    """The record written beside a binary, or None where there is none that can be read.

    One with an entry of another type than paramkit writes is damaged: None too.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = _fits(record, _ENTRIES) and _fits(record.get("cuda", {}), _CUDA_ENTRIES)
    return record if whole else None


def _fits(record: Any, entries: Mapping[str, type]) -> bool:
    """Whether a record is one, with entries of these types, as far as they are there."""
    return isinstance(record, dict) and all(
        isinstance(record[name], kind)
        and (kind is not list or all(isinstance(one, str) for one in record[name]))
        for name, kind in entries.items()
        if name in record
    )


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record in one step: a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def now() -> str:
    """The time as records hold it: UTC, such that the order of the texts is that of the times."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _is_on(value: str | None) -> bool:
    return (value or "").strip().lower() in ("1", "on", "yes", "true")
