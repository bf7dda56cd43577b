"""How the extension is compiled: in a process of its own, its whole output kept.

Two halves. :func:`compile_extension` starts a fresh Python and reads what it prints, because the
compiler's messages go to the process's output, not into the exception that torch raises.
:func:`_compile_here` is what runs in that process. Both setup.py and `paramkit build` come here.
The CUDA library is built by compile_cuda.py, afterwards.

setup.py loads this file by path, before paramkit or torch can be imported.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Relative, because setup.py loads the two files under another package name.
from . import sources

# The child must not import paramkit: in setup.py's case it is not installed yet.
_CHILD = """
import sys, types
folder, out, temp = sys.argv[1:]
package = types.ModuleType("_paramkit_build")
package.__path__ = [folder]
sys.modules[package.__name__] = package
from _paramkit_build.compile import _compile_here
_compile_here(out, temp)
"""
_NINJA_STEP = re.compile(r"^\[(\d+)/(\d+)\] ")
_SOURCE_ARGUMENT = re.compile(r"\s-c (/\S+)\s")


class CompileError(RuntimeError):
    """The compilation failed. ``output``: everything that it printed; ``what``: what was compiled."""

    what = "the extension"

    def __init__(self, summary: str, output: str) -> None:
        super().__init__(summary)
        self.output = output


def compile_extension(
    out: Path, temp: Path, log: Path, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Compile the extension into ``out`` and write its record beside it.

    Args:
        out: an existing folder; gets the binary and the record.
        temp: folder for object files; may be kept for an incremental build.
        log: file that gets the whole output.
        say: called with short lines on the progress.

    Returns:
        Path of the binary.

    Raises:
        CompileError: with the complete output.
    """
    temp.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _CHILD, str(Path(__file__).parent), str(out), str(temp)]
    log.unlink(missing_ok=True)

    def watch(line: str) -> None:
        progress = _progress(line)
        if progress:
            say(progress)

    status, output = run_logged(command, temp, log, watch)
    binary = out / sources.BINARY_NAME
    if status != 0:
        raise CompileError(summary(output, status), output)
    if not binary.is_file():
        raise CompileError(f"the build ended without an error but made no {binary.name}", output)
    return binary


def run_logged(
    command: list[str], folder: Path, log: Path, watch: Callable[[str], None]
) -> tuple[int, str]:
    """Run a compiler, or what calls one.

    Args:
        command: the command line.
        folder: where it runs.
        log: file that its output is appended to, as it comes.
        watch: called with every line of the output.

    Returns:
        Its exit status, and its whole output.
    """
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # ninja may be installed in the environment of this Python without that being activated.
    environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environ.get("PATH", "")])
    # The compiler's messages are searched for lines in English.
    environ["LC_ALL"] = "C.UTF-8"
    lines: list[str] = []
    with log.open("a", encoding="utf-8") as kept:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                kept.write(line)
                kept.flush()
                watch(line)
        except BaseException:
            # Ctrl-C, or a log that cannot be written. The process has started others: leave no
            # compiler behind, it would go on writing where the caller is about to clean up.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            status = process.wait()
    return status, "".join(lines)


def _progress(line: str) -> str | None:
    """One of ninja's steps as `[3/9] core/plan.cpp`; None for any other line."""
    step = _NINJA_STEP.match(line)
    if not step:
        return None
    source = _SOURCE_ARGUMENT.search(line)
    if not source:
        return line.strip()[:100]
    path = Path(source.group(1))
    name = "/".join(path.parts[path.parts.index("csrc") + 1 :]) if "csrc" in path.parts else path
    return f"{step.group(0)}{name}"


def summary(output: str, status: int) -> str:
    """The line that says most about a failure: the compiler's first error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        # nvcc numbers its warnings that are errors: `error #177-D: variable ...`.
        if re.search(r"(?<!-W)\b(fatal )?error( #[\w-]+)?:", line):
            return line
    return lines[-1] if lines else f"the build process ended with status {status}"


def compiler_command() -> list[str]:
    """The C++ compiler that torch's build tool takes: ``CXX``, else c++."""
    return shlex.split(os.environ.get("CXX") or "c++")


def _try_compiler() -> tuple[str, str]:
    """The compiler's version line, and what is wrong with it (empty if nothing)."""
    command = [*compiler_command(), "--version"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{shlex.join(command)}: {error}"
    if done.returncode != 0:
        message = (done.stderr or done.stdout).strip().partition("\n")[0]
        ending = f"{shlex.join(command)} ended with status {done.returncode}"
        return "", f"{ending}: {message}" if message else ending
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else compiler_command()[0], ""


def _compile_here(out: str, temp: str) -> None:
    """Compile in this process with torch's build tool. Runs in the child only."""
    csrc = sources.csrc_dir()
    if csrc is None:
        raise SystemExit("error: this installation of paramkit has no csrc folder to build from")
    compiler, problem = _try_compiler()
    if problem:
        raise SystemExit(
            f"error: no working C++ compiler: {problem}. Install g++ (Debian: apt-get install g++) "
            "or name a compiler in CXX"
        )
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"error: torch cannot be imported ({error}). The extension must be built against the "
            "torch that will load it: install torch first, then paramkit with "
            "pip install --no-build-isolation"
        ) from None
    try:
        from setuptools import Distribution
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError as error:
        raise SystemExit(
            f"error: {error}. Building needs setuptools and ninja: pip install setuptools ninja"
        ) from None

    flags = sources.compile_flags()
    # Headers of torch and Python as system headers: their warnings are not ours. The compiler then ignores
    # the plain -I of the same folders that torch's build tool adds.
    headers = [*include_paths(), sysconfig.get_path("include")]
    quiet = [f"-isystem{path}" for path in headers]
    extension = CppExtension(  # type: ignore[no-untyped-call]
        "_C",
        [str(path) for path in sources.cpp_sources(csrc)],
        include_dirs=[str(csrc)],
        extra_compile_args=[*flags, *quiet],
        extra_link_args=sources.link_flags(),
    )
    command = BuildExtension(Distribution({"name": "paramkit", "ext_modules": [extension]}))
    command.build_lib = out
    command.build_temp = temp
    command.ensure_finalized()
    version = str(torch.__version__)
    digest = sources.source_hash(csrc, version)
    command.run()
    if sources.source_hash(csrc, version) != digest:
        raise SystemExit(
            "error: the C++ sources were changed while they were compiled: build again"
        )
    binary = Path(out) / sources.BINARY_NAME
    sources.write_record(
        Path(out) / sources.RECORD_NAME,
        {
            "result": "built",
            "torch": version,
            "python": sources.PYTHON_TAG,
            "source_hash": digest,
            "sha256": sources.file_digest(binary),
            "compiler": compiler,
            "flags": flags,
            "time": sources.now(),
        },
    )
