"""What runs on a build with a sanitizer: every file of the suite but these, and what cannot run there."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

LEFT_OUT = (
    # They only build csrc, or look at it from outside.
    *(
        "build",
        "cuda_build",
        "backend",
        "sanitizers",
        "wheel",
        "build_faults",
        "gpu_script",
        "types",
    ),
    # They say what Python decides. Where they do write, it is by calls that the other files make, too.
    *("patterns", "regions", "boxes", "resolve", "rules", "rulefile", "suggestions", "sharding"),
    *("cli_inspect", "cli_process", "explain", "demo"),
    # Whole programs, each in a process of its own, most of it torch's imports; no call that is not elsewhere.
    *("docs", "examples", "benchmarks", "benchmarks_distributed", "gpu_benchmark"),
    # A program with sanitizers of its own; and resident memory, which ASan holds on to.
    *("fuzz_core", "leaks"),
)

FILES = tuple(
    f"tests/{path.name}"
    for path in sorted(TESTS.glob("test_*.py"))
    if path.stem.removeprefix("test_") not in LEFT_OUT
)

# By sanitizer: (how the test's name begins, why it cannot run there).
NOT_HERE: dict[str, tuple[tuple[str, str], ...]] = {
    "thread": (
        (
            "tests/test_concurrency.py::test_many_threads_at_one_model[cpu-without",
            "a race on purpose, with waiting switched off: TSan does report it",
        ),
    ),
}
