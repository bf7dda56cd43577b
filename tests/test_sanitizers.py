"""The sanitizers' canaries, without the extension: what `make sanitize` relies on is alive on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.emulation import compiler
from tests.instrumented import digest
from tests.sanitize import canary, leaks
from tests.sanitize.__main__ import Record, Result, wrong_of
from tests.sanitize.settings import HERE, SANITIZERS
from tests.sanitize.suite import FILES, LEFT_OUT, TESTS


@pytest.mark.parametrize("name", SANITIZERS)
def test_canaries(name: str, tmp_path: Path) -> None:
    """Each mistake is caught, a correct parallel region is not; a stray byte in a storage only by guards."""
    sanitizer = SANITIZERS[name]
    missing = sanitizer.missing()
    if missing:
        lacking(f"this compiler has no {', '.join(missing)}")
    # The kernels' canaries need the kernels: those are for `make sanitize`.
    sources = [one for one in sanitizer.sources if one != "canary_kernel.cpp"]
    library = tmp_path / "canary.so"
    flags = ["-std=c++17", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fwrapv", "-O3", "-g0", "-DNDEBUG"]  # Python's and ours, which the sanitizer's undo
    files = [str(HERE / one) for one in sources]
    command = [*compiler(), *flags, *sanitizer.cxxflags, *files, *sanitizer.ldflags]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = canary.check(sanitizer, library, tmp_path, sources)
    assert not wrong, "\n".join(wrong)


def test_a_dead_canary_is_told(tmp_path: Path) -> None:
    """Compiled without the sanitizer, the overflow passes, and the check says so."""
    library = tmp_path / "canary.so"
    flags = ["-fopenmp", "-fPIC", "-shared", str(HERE / "canary.cpp")]
    done = subprocess.run([*compiler(), *flags, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = canary.check(SANITIZERS["undefined"], library, tmp_path, ["canary.cpp"])
    assert len(wrong) == 1 and "expected a report with 'signed integer overflow'" in wrong[0]


def test_only_leaks_of_the_extension_count() -> None:
    report = """
==1==ERROR: LeakSanitizer: detected memory leaks

Direct leak of 77 byte(s) in 1 object(s) allocated from:
    #0 0x7fb739cb89cf in __interceptor_malloc asan_malloc_linux.cpp:69
    #1 0x56546529516a in helper (/site-packages/torch/lib/libtorch_cpu.so+0x116a)

Indirect leak of 8 byte(s) in 1 object(s) allocated from:
    #0 0x7fb739cb89cf in operator new(unsigned long) asan_new_delete.cpp:95
    #1 0x56546529516a in paramkit::make(int) csrc/torch/plan.cpp:12
    #2 0x56546529516b in make_plan (/checkout/paramkit/_C.cpython-311-x86_64-linux-gnu.so+0x116a)

SUMMARY: AddressSanitizer: 85 byte(s) leaked in 2 allocation(s).
"""
    (leak,) = leaks.ours(report)
    assert leak.startswith("Indirect leak of 8 byte(s)") and leak.endswith("+0x116a)")


def test_every_file_runs_or_is_left_out() -> None:
    assert len(FILES) + len(LEFT_OUT) == len(list(TESTS.glob("test_*.py")))


def test_reports_of_a_test_whose_name_is_a_pattern(tmp_path: Path) -> None:
    log = tmp_path / "test_x.py-y[cpu-1]"
    (tmp_path / f"{log.name}.17").write_text("x.cpp:3: runtime error: overflow")
    assert len(SANITIZERS["undefined"].reports(log)) == 1


def test_a_run_without_any_test_is_no_success() -> None:
    def result(status: int, reports: int = 0) -> Result:
        return {"status": status, "reports": reports}

    assert wrong_of([result(0), result(5)]) == []
    assert len(wrong_of([result(0), result(0, reports=1), result(1)])) == 2
    assert len(wrong_of([result(5), result(5)])) == 2


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """What passed on the same sources is kept at once; what failed, or ran otherwise, runs again."""

    def result(test: str, status: int = 0, reports: int = 0) -> Result:
        return {"test": test, "status": status, "reports": reports}

    file = tmp_path / "results.json"
    record = Record(file, "sources", ["-x"])
    assert record.passed() == {}
    for one in (result("a"), result("b", status=1), result("c", reports=1), result("d", 5)):
        assert record.add(one) == one
        assert set(Record(file, "sources", ["-x"]).passed()) <= {"a", "d"}
    assert Record(file, "sources", ["-x"]).passed() == {"a": result("a"), "d": result("d", 5)}
    assert Record(file, "others", ["-x"]).passed() == {}
    assert Record(file, "sources", []).passed() == {}
    file.write_text(file.read_text()[:40])
    assert Record(file, "sources", ["-x"]).passed() == {}


def test_the_digest_of_a_copy(tmp_path: Path) -> None:
    """Every file's name and bytes count, what a build or Python leaves there does not."""
    for name in ("csrc/a.cpp", "paramkit/ops.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    first = digest(tmp_path)
    (tmp_path / "paramkit/_cuda.so").touch()
    (tmp_path / "paramkit/__pycache__").mkdir()
    (tmp_path / "paramkit/__pycache__/ops.pyc").touch()
    assert digest(tmp_path) == first
    (tmp_path / "csrc/a.cpp").write_text("csrc/b.cpp")
    second = digest(tmp_path)
    (tmp_path / "csrc/a.cpp").rename(tmp_path / "csrc/b.cpp")
    assert len({first, second, digest(tmp_path)}) == 3
