"""Builds csrc/tests/fuzz_core.cpp: the torch-free core and the CPU kernels with sanitizers, without torch.

With clang it is libFuzzer's; else csrc/tests/fuzz_driver.cpp drives it, led by gcc's coverage.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.emulation import ROOT, compiler

__all__ = ["build", "build_libfuzzer", "libfuzzer", "sanitizers_missing", "sources"]

CSRC = ROOT / "csrc"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COMMON = ("-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", f"-I{CSRC / 'tests'}")


def sources() -> list[Path]:
    """The core and the CPU kernels."""
    return sorted([*(CSRC / "core").glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def sanitizers_missing(folder: Path) -> str:
    """Why the compiler cannot build with the sanitizers, or nothing."""
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*compiler(), *SANITIZE, str(source), "-o"]
    try:
        done = subprocess.run([*command, str(folder / "probe")], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[0]


def build(folder: Path, optimize: str = "-O1", changed: dict[str, Path] | None = None) -> Path:
    """The program with its own driver. Objects in the folder are used again.

    Args:
        optimize: the compiler's option.
        changed: other sources in the place of some, by file name: what is planted by tests.
    """
    changed = changed or {}
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())
    harness = [CSRC / "tests" / name for name in ("fuzz_core.cpp", "fuzz_driver.cpp")]

    def compile_one(source: Path) -> str:
        own = changed.get(source.name)
        target = folder / f"{source.name}{'.changed' if own else ''}.o"
        if not own and target.exists() and target.stat().st_mtime > newest:
            return str(target)
        # What is watched tells where it has been; the loops that it is held to need not.
        watched = () if source in harness else ("-fsanitize-coverage=trace-pc",)
        flags = [*COMMON, "-O1" if source in harness else optimize, *SANITIZE, *watched]
        # Beside the original, so that what it includes is found.
        include = (f"-I{source.parent}",)
        _run([*compiler(), *flags, *include, "-c", str(own or source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources(), *harness]))
    program = folder / ("fuzz_core" if not changed else f"fuzz_core-{'-'.join(sorted(changed))}")
    _run([*compiler(), *SANITIZE, *objects, "-o", str(program)])
    return program


def libfuzzer() -> str:
    """A clang++ that has libFuzzer, or nothing."""
    for name in ("clang++", *(f"clang++-{n}" for n in range(22, 12, -1))):
        path = shutil.which(name)
        if path is None:
            continue
        probe = [path, "-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", "/dev/null"]
        body = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }\n'
        if subprocess.run(probe, input=body, capture_output=True, text=True).returncode == 0:
            return path
    return ""


def build_libfuzzer(folder: Path, clang: str) -> Path:
    """The program as a target of libFuzzer."""
    # The warnings are gcc's business, in the other build. Numbers out of an integer's range are converted on
    # purpose (core/numbers.inc), which gcc's "undefined" does not include either.
    flags = [*COMMON, "-w", "-O1", "-fsanitize=fuzzer,address,undefined"]
    flags += ["-fno-sanitize=float-cast-overflow", "-fno-sanitize-recover=all"]
    program = folder / "fuzz_core_libfuzzer"

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}.clang.o"
        _run([clang, *flags, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources(), CSRC / "tests" / "fuzz_core.cpp"]))
    _run([clang, *flags, *objects, "-o", str(program)])
    return program
