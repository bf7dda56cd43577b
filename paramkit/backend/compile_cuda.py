"""How the CUDA library is compiled: by nvcc alone, for all architectures, once for each change.

It is a library of its own beside the extension, without torch and Python, so one build serves every
torch. It takes minutes, so what was built from the same inputs is taken again.

setup.py loads this file by path, before paramkit or torch can be imported.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import sources, toolkit
from .compile import CompileError, compiler_command, run_logged, summary

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_KERNEL = re.compile(r"Compiling entry function '\S+' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"\bUsed (\d+) registers")
_SHARED = re.compile(r"\b(\d+) bytes smem")


class CudaError(CompileError):
    """The CUDA library could not be built, and it had to be."""

    what = "the CUDA library"


def why_none(csrc: Path | None) -> tuple[str, str]:
    """Why no CUDA library is to be built: ``off`` or ``none``, and a sentence. Empty if it is.

    Raises:
        ValueError: if ``PARAMKIT_CUDA`` has an unknown value.
    """
    if sources.cuda_mode() == "off":
        return "off", "PARAMKIT_CUDA=off"
    if csrc is None or not cuda_sources(csrc):
        return "none", "there are no CUDA sources"
    if toolkit.find_nvcc() is None:
        return "none", f"no nvcc was found (looked in {toolkit.PLACES})"
    return "", ""


def check_settings(csrc: Path | None) -> None:
    """Say at once what would be an error after minutes of compiling the extension.

    Raises:
        ValueError: if ``PARAMKIT_CUDA`` has an unknown value.
        CudaError: if it is ``require``, and there is no nvcc.
    """
    result, reason = why_none(csrc)
    if result == "none" and sources.cuda_mode() == "require":
        raise CudaError(f"{reason}. Install the CUDA toolkit, or name its folder in CUDA_HOME", "")


def cuda_sources(csrc: Path) -> list[Path]:
    """The files that nvcc compiles."""
    return sorted((csrc / "cuda").glob("*.cu"))


def compile_library(
    out: Path,
    temp: Path,
    log: Path,
    say: Callable[[str], None] = lambda line: None,
    others: Iterable[Path] = (),
) -> dict[str, Any]:
    """Build the CUDA library into ``out``, and write what came of it into the record there.

    The record's entry ``cuda`` holds ``result`` (``built``, ``failed``, ``none`` without an nvcc,
    ``off``) and ``reason``. Of a library that was built also ``toolkit`` (the version of nvcc),
    ``architectures``, ``arch_list`` (the value of ``TORCH_CUDA_ARCH_LIST``), ``inputs`` (the hash
    of all that went in), ``werror`` (whether warnings were errors), ``sha256``, and ``kernels``:
    for each architecture the most that a kernel of it takes of ``registers``, ``spill_stores``,
    ``spill_loads``, ``stack`` and ``shared``.

    Args:
        out: the folder that has the extension and its record.
        temp: folder that keeps the library for the next build.
        log: file that the output is appended to.
        say: called with short lines on the progress.
        others: more folders with a record where a library from the same inputs may be.

    Returns:
        The entry.

    Raises:
        ValueError: if ``PARAMKIT_CUDA`` has an unknown value.
        CudaError: if it cannot be built, and ``PARAMKIT_CUDA`` or ``PARAMKIT_BUILD`` is
            ``require``; by default ``failed`` is the result, and the extension is used without it.
    """
    csrc = sources.csrc_dir()
    check_settings(csrc)
    result, reason = why_none(csrc)
    entry: dict[str, Any] = {"result": result, "reason": reason}
    if not result:
        assert csrc is not None
        try:
            entry = _built(csrc, out, temp, log, say, [temp, *others])
        except (CudaError, OSError) as error:  # a full disk too: the extension is there already
            if "require" in (sources.cuda_mode(), os.environ.get("PARAMKIT_BUILD")):
                raise
            entry = {"result": "failed", "reason": str(error)}
    with log.open("a", encoding="utf-8") as kept:
        kept.write(f"the CUDA library: {entry['result']}: {entry['reason'] or entry['toolkit']}\n")
    record = sources.read_record(out / sources.RECORD_NAME) or {}
    sources.write_record(out / sources.RECORD_NAME, {**record, "cuda": entry})
    return entry


def is_good(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a build now would leave the CUDA library of a folder as it is.

    Args:
        folder: a folder with a binary.
        record: the record in it.

    Raises:
        ValueError: if ``PARAMKIT_CUDA`` has an unknown value.
    """
    entry = record.get("cuda") or {}
    none, _ = why_none(sources.csrc_dir())
    if entry.get("result") != "built":
        # What failed is tried again: whatever was wrong may have been put right.
        return none == "off" or (none == "none" and sources.cuda_mode() != "require")
    if none == "off" or not _is_whole(folder / sources.CUDA_NAME, entry):
        return False
    # A library that was built stays good when the nvcc that built it has gone.
    return none == "none" or entry.get("arch_list") == _arch_list()


def kernel_figures(output: str) -> dict[str, dict[str, int]]:
    """What the kernels take, by architecture, from the output of ``ptxas -v``.

    Args:
        output: of a whole compilation. The lines of one architecture stand together.

    Returns:
        For each architecture the largest of each figure over its kernels.
    """
    figures: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}

    def note(**found: str) -> None:
        for name, text in found.items():
            current[name] = max(current.get(name, 0), int(text))

    for line in output.splitlines():
        if kernel := _KERNEL.search(line):
            names = ("registers", "spill_stores", "spill_loads", "stack", "shared")
            current = figures.setdefault(kernel.group(1), dict.fromkeys(names, 0))
        if frame := _FRAME.search(line):
            note(stack=frame.group(1), spill_stores=frame.group(2), spill_loads=frame.group(3))
        if registers := _REGISTERS.search(line):
            note(registers=registers.group(1))
        if shared := _SHARED.search(line):
            note(shared=shared.group(1))
    return dict(sorted(figures.items(), key=lambda item: (len(item[0]), item[0])))


def _built(
    csrc: Path,
    out: Path,
    temp: Path,
    log: Path,
    say: Callable[[str], None],
    folders: Iterable[Path],
) -> dict[str, Any]:
    """The entry of a library that is now in ``out``: made, or found in one of the folders."""
    nvcc = toolkit.find_nvcc()
    assert nvcc is not None
    try:
        version, targets = toolkit.version(nvcc), toolkit.targets(nvcc)
    except toolkit.ToolkitError as error:
        raise CudaError(str(error), "") from None
    named = [*_host_compiler(), *targets]
    flags = [*sources.nvcc_flags(), *named]
    werror = "--Werror" in flags
    # Without the flags for warnings, which change nothing in the library.
    hashed = [*sources.nvcc_flags({}), *named]
    inputs = _inputs(csrc, hashed, version)
    for folder in folders:
        entry = (sources.read_record(folder / sources.RECORD_NAME) or {}).get("cuda") or {}
        same = entry.get("inputs") == inputs and (entry.get("werror") or not werror)
        if same and _is_whole(folder / sources.CUDA_NAME, entry):
            say(f"the CUDA library in {folder} is made from the same sources: taken again")
            shutil.copy2(folder / sources.CUDA_NAME, out / sources.CUDA_NAME)
            return {**entry, "arch_list": _arch_list()}
    temp.mkdir(parents=True, exist_ok=True)
    staged = temp / f"{sources.CUDA_NAME}.{os.getpid()}.tmp"
    try:
        output = _run_nvcc(nvcc, csrc, [*flags, "-o", str(staged)], targets, log, say)
        if not staged.is_file():
            raise CudaError("nvcc ended without an error but made no library", output)
        if _inputs(csrc, hashed, version) != inputs:
            inputs = ""  # edited meanwhile: nobody knows what this is made from
        entry = {
            "result": "built",
            "reason": "",
            "toolkit": version,
            "architectures": toolkit.architectures(targets),
            "arch_list": _arch_list(),
            "inputs": inputs,
            "werror": werror,
            "sha256": sources.file_digest(staged),
            "kernels": kernel_figures(output),
        }
        staged.replace(temp / sources.CUDA_NAME)
    finally:
        staged.unlink(missing_ok=True)
    sources.write_record(temp / sources.RECORD_NAME, {"cuda": entry})
    shutil.copy2(temp / sources.CUDA_NAME, out / sources.CUDA_NAME)
    return entry


def _run_nvcc(
    nvcc: Path,
    csrc: Path,
    flags: list[str],
    targets: list[str],
    log: Path,
    say: Callable[[str], None],
) -> str:
    """Compile and link; the output."""
    command = [str(nvcc), *flags, "--threads", str(sources.jobs()), f"-I{csrc}"]
    command += [str(path) for path in cuda_sources(csrc)]
    with log.open("a", encoding="utf-8") as kept:
        kept.write(f"{shlex.join(command)}\n")
    names = toolkit.architectures(targets)
    machine = [name for name in names if not name.endswith("+PTX")]
    say(f"compiling the CUDA kernels for {', '.join(names)}; this takes minutes")
    done: list[str] = []

    def watch(line: str) -> None:
        kernel = _KERNEL.search(line)
        if kernel and kernel.group(1) not in done:
            done.append(kernel.group(1))
            say(f"[{len(done)}/{len(machine)}] cuda/sm_{done[-1]}")

    status, output = run_logged(command, log.parent, log, watch)
    if status != 0:
        raise CudaError(summary(output, status), output)
    return output


def _inputs(csrc: Path, flags: list[str], version: str) -> str:
    """16 hex digits over all that the library is made from."""
    digest = hashlib.sha256("\0".join([*flags, version]).encode())
    for path in _read_by_nvcc(csrc):
        digest.update(b"\0" + path.relative_to(csrc).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read_by_nvcc(csrc: Path) -> list[Path]:
    """The CUDA sources and all that they include below csrc, whatever the conditions around it."""
    found: set[Path] = set()
    left = cuda_sources(csrc)
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            names = _INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace"))
            places = [folder / name for name in names for folder in (csrc, path.parent)]
            left += [place for place in places if place.is_file()]
    return sorted(found)


def _host_compiler() -> list[str]:
    """The C++ compiler named in CXX for nvcc too, where it is a single word: nvcc takes no other."""
    named = compiler_command()
    if len(named) != 1 or not os.environ.get("CXX") or os.environ.get("NVCC_CCBIN"):
        return []
    return ["-ccbin", named[0]]


def _is_whole(library: Path, entry: dict[str, Any]) -> bool:
    return sources.is_whole(library, entry.get("sha256"))


def _arch_list() -> str:
    return (os.environ.get("TORCH_CUDA_ARCH_LIST") or "").strip()
