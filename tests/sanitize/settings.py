"""The sanitizers: flags, how a process is started with one, what its reports look like."""

from __future__ import annotations

import glob
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.emulation import compiler

HERE = Path(__file__).resolve().parent
BUILT = "build/sanitize"
# Line numbers, readable stacks, the assertions of csrc. Last, so they win over -O3 -g0.
COMMON = ("-O1", "-g1", "-fno-omit-frame-pointer", "-UNDEBUG")


@dataclass(frozen=True)
class Sanitizer:
    """One of them.

    Attributes:
        name: as in ``-fsanitize=``.
        flags: for the compiler and the linker, besides ``-fsanitize=`` and COMMON.
        link: for the linker alone.
        libraries: what has to be loaded before Python itself.
        variable: of the environment, with its options.
        options: those; ``{here}`` is this folder.
        environ: what else a process needs.
        prefix: what its command line begins with.
        sources: C++ files of this folder that go into its build.
        marks: a line of a report has one of these.
    """

    name: str
    variable: str
    options: str
    marks: tuple[str, ...]
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("canary.cpp",)

    @property
    def cxxflags(self) -> list[str]:
        return [*COMMON, f"-fsanitize={self.name}", *self.flags]

    @property
    def ldflags(self) -> list[str]:
        return [f"-fsanitize={self.name}", *self.link]

    def missing(self) -> list[str]:
        """Libraries that this machine's compiler does not have."""
        runtime = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
        return [one for one in (runtime[self.name], *self.libraries) if _library(one) is None]

    def process(self, log: Path) -> dict[str, str]:
        """The environment of a process whose reports go to files that begin with ``log``."""
        options = self.options.format(here=HERE)
        environ = {self.variable: f"{options}:log_path={log}", **self.environ}
        found = [path for path in map(_library, self.libraries) if path]
        if found:
            environ["LD_PRELOAD"] = " ".join(found)
        return {**os.environ, **environ, "PYTHONFAULTHANDLER": "1"}

    def reports(self, log: Path) -> list[str]:
        """The texts of the reports in those files."""
        texts = [
            path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(log.parent.glob(f"{glob.escape(log.name)}.*"))
        ]
        return [text for text in texts if any(mark in text for mark in self.marks)]


def _library(name: str) -> str | None:
    """The path of one of the compiler's libraries."""
    command = [*compiler(), f"-print-file-name={name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    path = Path(done.stdout.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


# torch and Python are not instrumented. libasan has to come first, and before a libstdc++: alone it ends at
# the first C++ exception.
SANITIZERS = {
    one.name: one
    for one in (
        Sanitizer(
            "address",
            "ASAN_OPTIONS",
            # Leaks are looked for at the end of each file's tests (leaks.py), not at exit: there Python leaves
            # much behind. A failed allocation is an answer that torch checks.
            "abort_on_error=1:detect_leaks=1:leak_check_at_exit=0:allocator_may_return_null=1"
            ":detect_stack_use_after_return=0:suppressions={here}/address.supp",
            ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer"),
            libraries=("libasan.so", "libstdc++.so"),
            # Python's own pools would hide objects from ASan, and from the search for leaks what they point to.
            environ={
                "PYTHONMALLOC": "malloc",
                "LSAN_OPTIONS": f"print_suppressions=0:suppressions={HERE}/leak.supp",
            },
            sources=("canary.cpp", "canary_kernel.cpp"),
        ),
        Sanitizer(
            "undefined",
            "UBSAN_OPTIONS",
            "abort_on_error=1:print_stacktrace=1:suppressions={here}/undefined.supp",
            ("runtime error:",),
            # Python's own flags have -fwrapv: an overflow would be defined, and none reported.
            flags=("-fno-sanitize-recover=all", "-fno-wrapv"),
        ),
        Sanitizer(
            "thread",
            "TSAN_OPTIONS",
            # A forked child of a process with threads is what DataLoader's workers are.
            "halt_on_error=0:exitcode=66:die_after_fork=0:ignore_noninstrumented_modules=1"
            ":report_signal_unsafe=0:history_size=4:allocator_may_return_null=1:suppressions={here}/thread.supp",
            ("WARNING: ThreadSanitizer",),
            link=("-Wl,--wrap=GOMP_parallel",),
            libraries=("libtsan.so", "libstdc++.so"),
            # The runtime's own thread, which a fork starts anew.
            environ={"PARAMKIT_TESTS_RUNTIME_THREADS": "1"},
            # Its shadow memory has a fixed place, which must be free.
            prefix=("setarch", "-R"),
            sources=("canary.cpp", "openmp.cpp"),
        ),
    )
}
