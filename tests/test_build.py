"""Every way that building can go, each in a process of its own on a copy of the project."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.tiny import BROKEN, Project

USED = "import paramkit; print(paramkit.backend.active().__name__)"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="module")
def installed_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("installed"))
    status, output = project.install()
    assert status == 0, output
    return project


@pytest.fixture(scope="module")
def cached_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("cached"))
    status, output = project.build()
    assert status == 0, output
    return project


@pytest.fixture
def installed(installed_once: Project, tmp_path: Path) -> Project:
    """A project that was installed with its extension."""
    return installed_once.copy(tmp_path)


@pytest.fixture
def cached(cached_once: Project, tmp_path: Path) -> Project:
    """A project whose extension is in the extension cache alone."""
    return cached_once.copy(tmp_path)


# --- installing ---------------------------------------------------------------------------------


def test_install_builds_and_records(project: Project) -> None:
    (project.package / "_build_error.txt").write_text("left by an earlier build")
    status, output = project.install()
    assert status == 0, output
    record = json.loads((project.package / "_C.json").read_text())
    assert record["result"] == "built"
    assert {"torch", "python", "source_hash", "compiler", "flags", "time"} <= set(record)
    assert not any(flag.startswith("-march") for flag in record["flags"])
    assert not (project.package / "_build_error.txt").exists()
    assert "paramkit._C" in project.python(USED)


@pytest.mark.parametrize("how", ["no compiler", "syntax error"])
def test_install_survives_a_failing_build(tmp_path: Path, how: str) -> None:
    project = Project(tmp_path, BROKEN) if how == "syntax error" else Project(tmp_path)
    (project.package / "_C.json").write_text("{}")
    settings = {"CXX": "/bin/false"} if how == "no compiler" else {}
    status, output = project.install(**settings)
    assert status == 0, output
    assert "installed without its extension" in output
    assert not list(project.package.glob("_C.*"))
    kept = (project.package / "_build_error.txt").read_text()
    expected = {
        "no compiler": "/bin/false --version ended with status 1",
        "syntax error": "tiny.cpp",
    }
    assert expected[how] in kept.splitlines()[0]
    # One warning, with the reason and the remedy; status() has the original error.
    output = project.python(f"{USED}; paramkit.backend.active(); print(paramkit.status())")
    assert output.count("RuntimeWarning") == 1
    assert "paramkit.backend.native" in output
    assert "paramkit build" in output
    assert expected[how] in output.partition("\nerror\n")[2]


@pytest.mark.parametrize("how", ["compiler not found", "syntax error"])
def test_require_fails_loudly(tmp_path: Path, how: str) -> None:
    project = Project(tmp_path, BROKEN)
    settings = {"CXX": "no-such-c++"} if how == "compiler not found" else {}
    status, output = project.install(PARAMKIT_BUILD="require", **settings)
    assert status != 0
    assert "PARAMKIT_BUILD=require, and the extension did not build" in output
    assert ("no-such-c++" if settings else "this is not C++;") in output


def test_off_is_quiet_and_told(cached: Project) -> None:
    project = cached  # what was built before must not be used
    status, output = project.install(PARAMKIT_BUILD="off")
    assert status == 0, output
    assert not list(project.package.glob("_C*.so"))
    output = project.python(f"{USED}; print(paramkit.status())")
    assert "RuntimeWarning" not in output
    assert "PARAMKIT_BUILD=off was set when paramkit was installed" in output
    # Asked for later by hand, the extension is used.
    status, output = project.build("--quiet")
    assert status == 0, output
    assert "already built" not in output  # quiet: the path alone
    assert "paramkit._C" in project.python(USED)


def test_an_unknown_mode_names_the_choices(project: Project) -> None:
    status, output = project.install(PARAMKIT_BUILD="bogus")
    assert status != 0
    assert "PARAMKIT_BUILD: got 'bogus', expected one of auto, require, off" in output


# --- paramkit build -----------------------------------------------------------------------------


def test_build_then_the_next_call_uses_it(project: Project) -> None:
    output = project.python(
        "import paramkit\n"
        "print(paramkit.status().backend)\n"
        "path = paramkit.backend.build()\n"
        "print(paramkit.backend.active().__name__, paramkit.status().binary == str(path))\n"
        "print(paramkit.status().build_log)\n"
    )
    assert "RuntimeWarning" not in output
    lines = output.splitlines()
    assert lines[0] == "native"
    assert "[1/1] core/tiny.cpp" in lines
    assert lines[-2] == "paramkit._C True"
    assert Path(lines[-1]).is_file()
    (binary,) = project.binaries()
    # A second build has nothing to do; --force builds again.
    stamp = binary.stat().st_mtime_ns
    status, output = project.build()
    assert status == 0 and "already built" in output
    assert binary.stat().st_mtime_ns == stamp
    status, output = project.build("--force")
    assert status == 0 and "already built" not in output
    assert binary.stat().st_mtime_ns != stamp
    assert sorted(path.name for path in binary.parent.parent.iterdir()) == sorted(
        [".lock", binary.parent.name]
    )


def test_build_failures_are_explained(tmp_path: Path) -> None:
    project = Project(tmp_path, BROKEN)
    status, output = project.build()
    assert status == 1
    assert "Traceback" not in output
    assert "tiny.cpp" in output and "error:" in output and "What to do:" in output
    log = next(line for line in output.splitlines() if "whole log" in line).split(": ")[1]
    assert "this is not C++;" in Path(log).read_text()
    assert not project.binaries()
    assert not list(project.cache.glob("paramkit/.building-*"))

    status, output = project.build(CXX="/bin/false")
    assert status == 1
    assert "no working C++ compiler: /bin/false --version ended with status 1" in output


def test_a_cache_that_cannot_be_written(project: Project) -> None:
    # A file in the way, since permissions do not stop root.
    project.cache.write_text("not a folder")
    status, output = project.build()
    assert status == 1
    assert str(project.cache / "paramkit") in output and "TORCH_EXTENSIONS_DIR" in output
    assert "Traceback" not in output
    # Using paramkit needs no cache.
    assert "paramkit.backend.native" in project.python(USED)


def test_two_builds_at_once_build_once(project: Project) -> None:
    both = [project.start("-m", "paramkit", "build") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("[1/1] core/tiny.cpp" in output for output in outputs) == 1, outputs
    assert len(project.binaries()) == 1


def test_a_killed_build_blocks_nobody(tmp_path: Path) -> None:
    # A compiler that hangs: the build is killed in the middle of it, holding the lock.
    project = Project(tmp_path)
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-c*) exec sleep 20;; *) exec c++ "$@";; esac\n')
    compiler.chmod(0o755)
    process = project.start("-m", "paramkit", "build", CXX=str(compiler))
    deadline = time.monotonic() + 60
    while not list(project.cache.glob("paramkit/.building-*/objects/build.ninja")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    status, output = project.build()
    assert status == 0, output
    assert not list(project.cache.glob("paramkit/.building-*"))
    assert "paramkit._C" in project.python(USED)


# --- binaries that must not be trusted ----------------------------------------------------------


def test_a_binary_of_another_torch_is_never_opened(
    installed: Project, cached_once: Project
) -> None:
    project = installed
    path = project.package / "_C.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "1.0.0"}))
    code = f"{USED}; print('mapped:', 'paramkit/_C' in open('/proc/self/maps').read())"
    output = project.python(code)
    assert "the extension was built for torch 1.0.0, and this is" in output
    assert output.count("RuntimeWarning") == 1
    assert "mapped: False" in output
    # With what the remedy in the warning makes, all is well.
    project.adopt_cache(cached_once)
    assert "paramkit._C" in project.python(USED)


def test_a_damaged_binary_in_the_cache(cached: Project) -> None:
    (binary,) = cached.binaries()
    content = binary.read_bytes()
    for damaged in (content[: len(content) // 2], b"no library"):
        binary.write_bytes(damaged)
        output = cached.python(f"{USED}; print(paramkit.status())")
        assert output.count("RuntimeWarning") == 1 and "damaged" in output
        assert "paramkit.backend.native" in output
    # `paramkit build` sees that the binary is bad and puts it right.
    status, output = cached.build()
    assert status == 0 and "already built" not in output
    assert "paramkit._C" in cached.python(USED)


def test_a_binary_that_cannot_be_opened(installed: Project, cached_once: Project) -> None:
    project = installed
    (binary,) = project.package.glob("_C*.so")
    binary.write_bytes(b"no library " * 100)
    output = project.python(f"{USED}; print(paramkit.status().error)")
    assert output.count("RuntimeWarning") == 1
    assert "paramkit.backend.native" in output
    assert "invalid ELF header" in output.splitlines()[-1]
    status, output = project.run("-c", USED, PARAMKIT_BACKEND="cpu")
    assert status != 0 and "invalid ELF header" in output
    # With what the remedy in the warning makes, all is well: another binary is tried.
    project.adopt_cache(cached_once)
    assert "paramkit._C" in project.python(USED)


def test_newer_sources_are_told_and_a_newer_build_preferred(installed: Project) -> None:
    project = installed
    project.source.write_text(project.source.read_text() + "// changed\n")
    output = project.python("import paramkit; print(paramkit.status())")
    assert "older than the C++ sources" in output and "cpu:" in output
    assert project.build("--quiet")[0] == 0
    output = project.python("import paramkit; print(paramkit.status())")
    assert "built by `paramkit build`" in output
