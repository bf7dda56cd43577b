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
    *("cli_inspect", "cli_process", "explain", "demo", "removed_checks"),
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

# Their runtimes have malloc, read and the signals to themselves.
_RUNTIME = (
    (
        "tests/test_faults_memory.py::test_every_allocation_of_the_extension",
        "a preloaded malloc that fails: the runtime has to come first",
    ),
    (
        "tests/test_faults_memory.py::test_staging_that_cannot_be_had",
        "a preloaded malloc that fails: the runtime has to come first",
    ),
    (
        "tests/test_faults_reads.py::test_reads_that_come_short_are_interrupted_or_fail",
        "a preloaded read that fails: the runtime has to come first",
    ),
    (
        "tests/test_faults.py::test_what_would_end_it_is_a_map",
        "a bus error on purpose, which ends the process by way of the runtime",
    ),
    ("tests/test_fuzz.py::test_a_crash_is_found", "a crash on purpose is a report"),
    ("tests/test_ranks.py::test_a_rank_may_die_on_purpose", "a crash on purpose is a report"),
    (
        "tests/test_cuda_emulated.py::test_a_missing_barrier_is_noticed",
        "a crash on purpose is a report",
    ),
)
_COMPILER = (
    (
        "tests/test_compile.py::test_all_in_one_graph_of_inductor",
        "torch does not take a compiler with flags of its own",
    ),
)

# By sanitizer: (how the test's name begins, why it cannot run there).
NOT_HERE: dict[str, tuple[tuple[str, str], ...]] = {
    "address": (*_RUNTIME, *_COMPILER),
    "undefined": _COMPILER,
    "thread": (
        *_RUNTIME,
        *(
            (
                f"tests/test_fork.py::{test}",
                "TSan ends a child of several threads that starts its own",
            )
            for test in (
                "test_a_child_while_another_thread_writes",
                "test_files_are_read_in_a_child",
                "test_workers_of_a_data_loader[fork]",
            )
        ),
        (
            "tests/test_life_cycle.py::test_the_interpreter_ends_while_threads_write",
            "a race on purpose: plans, and operators, which wait for nobody, write the same tensors",
        ),
        (
            "tests/test_concurrency.py::test_many_threads_at_one_model[cpu-without",
            "a race on purpose, with waiting switched off: TSan does report it",
        ),
    ),
}
