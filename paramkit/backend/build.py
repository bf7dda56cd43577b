"""Builds the extension and the CUDA library into torch's extension cache, when asked to and never otherwise."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from paramkit.backend import loader, sources
from paramkit.backend.lock import exchange, locked

if TYPE_CHECKING:
    from paramkit.backend import compile as compiling


class BuildError(loader.BackendError):
    """The extension, or a CUDA library that must be there, could not be built.

    The message holds the end of the log and its path.

    Example:
        >>> from paramkit import backend
        >>> try:
        ...     backend.build(verbose=False)  # doctest: +SKIP
        ... except backend.BuildError as error:
        ...     print(error)
    """


def build(verbose: bool = True, force: bool = False) -> Path:
    """Compile the extension for this torch and this Python, unless that has been done.

    With it the CUDA library, where there is an nvcc; ``PARAMKIT_CUDA`` says whether it must be.

    Two processes that build at once build once: the second waits, then finds the first one's
    result. The result appears in one step, so a process that looks for it sees all or nothing.
    The next call in this process uses it, provided that no extension was loaded before.

    Args:
        verbose: print the progress.
        force: build again even if there is a good binary.

    Returns:
        Path of the binary in the cache.

    Raises:
        BuildError: if there is no compiler, the build fails, the cache cannot be written, or
            ``PARAMKIT_CUDA`` has an unknown value.

    Example:
        >>> from paramkit import backend
        >>> backend.build()  # doctest: +SKIP
        PosixPath('.../torch_extensions/py311_cpu/paramkit/0f3c.../_C.cpython-311-x86_64-linux-gnu.so')
    """
    import torch

    say: Callable[[str], None] = _print if verbose else _silent
    csrc = sources.csrc_dir()
    if csrc is None:
        raise BuildError(
            f"build: this installation has no C++ sources (looked beside and in "
            f"{sources.PACKAGE_DIR}): reinstall paramkit from its wheel or its repository"
        )
    digest = sources.source_hash(csrc, str(torch.__version__))
    try:
        cache = sources.cache_dir(torch.version)
    except RuntimeError as error:
        raise BuildError(
            f"there is no folder to build in ({error}): name one with TORCH_EXTENSIONS_DIR"
        ) from None
    try:
        sources.cuda_mode()
    except ValueError as error:
        raise BuildError(f"build: {error}") from None
    target = cache / digest
    try:
        with locked(cache, say):
            _sweep(cache)
            if not force and _is_good(target):
                _mark_as_asked_for(target)
                say(f"already built: {target / sources.BINARY_NAME}")
            else:
                _build_into(target, say, force)
    except OSError as error:
        raise BuildError(
            f"build: cannot write to the extension cache {cache}: {error}. Set "
            "TORCH_EXTENSIONS_DIR to a folder that can be written, now and when paramkit runs"
        ) from error
    if loader.extension() is None:
        loader.reset()
    else:
        say("this process goes on with the extension it has loaded; the next one takes the new one")
    return target / sources.BINARY_NAME


def _build_into(target: Path, say: Callable[[str], None], force: bool) -> None:
    """Compile in a temporary folder beside the target, then rename. The lock is held."""
    from paramkit.backend import compile as compiling
    from paramkit.backend import compile_cuda

    cache = target.parent
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    try:
        out = work / "out"
        out.mkdir()
        log = out / "build.log"
        log.touch()
        say(f"building the extension into {target}")
        # The other builds in the cache may have the same CUDA library, which takes minutes.
        others = () if force else [folder for folder in cache.glob("[!.]*") if folder.is_dir()]
        try:
            compile_cuda.check_settings(sources.csrc_dir())
            compiling.compile_extension(out, work / "objects", log, say)
            cuda = compile_cuda.compile_library(out, work / "cuda", log, say, others)
        except compiling.CompileError as error:
            kept = cache / f"{target.name}.failed.log"
            log.replace(kept)
            raise BuildError(_failure(error, kept)) from None
        exchange(out, target)
        (cache / f"{target.name}.failed.log").unlink(missing_ok=True)
        say(f"built {target / sources.BINARY_NAME}")
        if cuda["result"] == "failed":
            say(
                f"warning: without the CUDA library: {cuda['reason']}; "
                f"the output is in {target / 'build.log'}"
            )
        elif cuda["result"] != "built":
            say(f"without the CUDA library: {cuda['reason']}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Remove what killed builds left. Nobody else builds here now: the lock is held."""
    for leftover in cache.glob(".building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in cache.glob(f"*/{sources.RECORD_NAME}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _is_good(folder: Path) -> bool:
    """Whether the folder holds all that a build would make now, whole, with the same flags."""
    from paramkit.backend import compile_cuda

    record = sources.read_record(folder / sources.RECORD_NAME)
    binary = folder / sources.BINARY_NAME
    if record is None:
        return False
    checked = [flag for flag in sources.compile_flags() if flag != "-Werror"]
    same_flags = [flag for flag in record.get("flags", []) if flag != "-Werror"] == checked
    whole = sources.is_whole(binary, record.get("sha256"))
    return same_flags and whole and compile_cuda.is_good(folder, record)


def _mark_as_asked_for(folder: Path) -> None:
    """After an install with PARAMKIT_BUILD=off, only what was asked for later is used."""
    path = folder / sources.RECORD_NAME
    sources.write_record(path, {**(sources.read_record(path) or {}), "time": sources.now()})


def _failure(error: compiling.CompileError, log: Path) -> str:
    from paramkit.backend import compile_cuda

    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # After the compiler's messages comes the traceback of the tool that called it: not the news.
    traceback = next((i for i, line in enumerate(lines) if line.startswith("Traceback")), None)
    if traceback and any("error:" in line for line in lines[:traceback]):
        lines = lines[:traceback]
    tail = "\n".join(f"  {line[:300]}" for line in lines[-25:])
    if isinstance(error, compile_cuda.CudaError):
        remedy = (
            "install the CUDA toolkit (or name its folder in CUDA_HOME), and a C++ compiler that its "
            "nvcc takes (NVCC_CCBIN names one); then `paramkit build` again. PARAMKIT_CUDA=off "
            "builds without it: CUDA tensors then go through torch's own copy_ and fill_."
        )
    else:
        remedy = (
            "install a C++ compiler (or name one in CXX), and `pip install setuptools ninja`; then "
            "`paramkit build` again. Until then paramkit runs on torch's own copy_ and fill_."
        )
    return (
        f"build: {error.what} did not build: {error}\n{tail}\n"
        f"The whole log: {log}\nWhat to do: {remedy}"
    )


def _print(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    pass
