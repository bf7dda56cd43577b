"""The C++ core and the CPU kernels under ASan and UBSan, against plain loops; and that defects are found."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.fuzz import core

FAILED = 77  # what the driver ends with when a comparison fails
# Defects in the core's own source, each of which must be found: (file, what is there, what takes its place).
DEFECTS = {
    "merges loops that go on in the destination alone": (
        *("normalize.cpp", "&& outer.src == inner.src * inner.size", "|| inner.size < 0"),
    ),
    "takes writes that repeat an element": (
        *("normalize.cpp", "dims[i].dst < reach", "dims[i].dst < width"),
    ),
    "forgets what is read": (
        *("overlap.cpp", "writes[w].begin < read.end) return true", "read.end == nullptr) return true"),
    ),
}  # fmt: skip
MORE_DEFECTS = {
    "loses the turns that fill no unit": (
        *("classify.cpp", "ceil_div(dims[rank - 1].size, turns_of(task.run))"),
        "std::max<int64_t>(dims[rank - 1].size / turns_of(task.run), 1)",
    ),
    "thinks that columns always fit their rows": (
        *("overlap.cpp", "if (row.begin + row.reach > stride) return false;", ""),
    ),
    "keeps an order of loops that is none": ("normalize.cpp", "a.dst > b.dst", "a.dst < b.dst"),
    "takes any loop for the run of a source": (
        *("classify.cpp", "(fill || last.src == task.src_width())", "(fill || last.src != 0)"),
    ),
    "counts strips of a transpose down": (
        *("classify.cpp", "outer * ceil_div(across, kStripAcross)"),
        "outer * std::max<int64_t>(across / kStripAcross, 1)",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz_core")
    problem = core.sanitizers_missing(path)
    if problem:
        lacking(f"the compiler has no sanitizers: {problem}")
    core.build(path, "-O0")
    return path


def run(program: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *args],
        cwd=program.parent,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_random_and_mutated_lists(folder: Path) -> None:
    done = run(folder / "fuzz_core", "--seconds", "4", "--seed", "1")
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"(\d+) lists, (\d+) inputs kept, seed 1\n", done.stdout)
    assert found, done.stdout
    # A loaded machine does fewer; none at all, or no way that led to new code, is another matter.
    assert int(found[1]) > 100 and int(found[2]) > 20


CANARIES = {
    "stray": "byte",
    "lost": "byte",
    "overlap": "writes that share memory were said to be apart",
    "heap": "AddressSanitizer: heap-buffer-overflow",
    "shift": "shift exponent 40 is too large",
}


@pytest.mark.parametrize("canary", CANARIES)
def test_canaries_are_seen(folder: Path, canary: str) -> None:
    done = run(folder / "fuzz_core", "--seconds", "60", PARAMKIT_FUZZ_CANARY=canary)
    assert done.returncode != 0
    assert CANARIES[canary] in done.stderr


def test_a_failure_is_kept_and_repeats(folder: Path) -> None:
    program = folder / "fuzz_core"
    (folder / "crash.bin").unlink(missing_ok=True)
    first = run(program, "--seconds", "60", "--seed", "3", PARAMKIT_FUZZ_CANARY="stray")
    assert first.returncode == FAILED and "fuzz_core crash.bin" in first.stderr
    again = run(program, "crash.bin", PARAMKIT_FUZZ_CANARY="stray")
    assert again.returncode == FAILED
    assert again.stderr.splitlines()[0] == first.stderr.splitlines()[0]
    assert run(program, "crash.bin").returncode == 0  # without the defect


def assert_found(folder: Path, defect: tuple[str, str, str]) -> None:
    name, was, becomes = defect
    (original,) = (path for path in core.sources() if path.name == name)
    text = original.read_text()
    assert text.count(was) == 1, f"{name} has changed: plant another defect"
    changed = folder / name
    changed.write_text(text.replace(was, becomes))
    program = core.build(folder, "-O0", {name: changed})
    done = run(program, "--seconds", "60", "--seed", "2")
    assert done.returncode != 0 and ("fuzz_core: " in done.stderr or "Sanitizer" in done.stderr)


@pytest.mark.parametrize("what", DEFECTS)
def test_defects_in_the_core_are_found(folder: Path, what: str) -> None:
    assert_found(folder, DEFECTS[what])


@pytest.mark.slow
@pytest.mark.parametrize("what", MORE_DEFECTS)
def test_more_defects_in_the_core_are_found(folder: Path, what: str) -> None:
    assert_found(folder, MORE_DEFECTS[what])


@pytest.mark.slow
def test_libfuzzer(tmp_path: Path) -> None:
    clang = core.libfuzzer()
    if not clang:
        pytest.skip("no clang++ with libFuzzer")
    program = core.build_libfuzzer(tmp_path, clang)
    done = run(program, "-max_total_time=30", "-seed=1", "-max_len=400")
    assert done.returncode == 0, done.stderr[-4000:]
    planted = run(program, "-max_total_time=60", "-seed=1", PARAMKIT_FUZZ_CANARY="stray")
    assert planted.returncode != 0 and "fuzz_core: " in planted.stderr
