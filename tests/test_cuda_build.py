"""The CUDA library: when it is built and for what, what of it is recorded. nvcc is a stand-in, and fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import paramkit
from paramkit.backend import compile_cuda, sources, toolkit
from tests.conftest import must_have_extension, need_extension
from tests.fake_nvcc import ARCHITECTURES, TARGETS, VERSION, FakeNvcc, add_cuda, path_without_nvcc
from tests.tiny import Project

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources of a library, and an environment without nvcc and without any setting."""
    folder = tmp_path / "root" / "csrc"
    files = {
        "cuda/launch.cu": '#include <vector>\n#include "cuda/kernels.cuh"\n',
        "cuda/kernels.cuh": '# include "../core/dtypes.h"\n#include "cuda/kernels.cuh"\n',
        "core/dtypes.h": '#include "not_here.h"\n',
        "core/task.h": "// the extension's alone\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(sources, "PACKAGE_DIR", folder.parent / "paramkit")
    monkeypatch.setattr(toolkit, "DEFAULT_HOME", tmp_path / "usual")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in os.environ:
        if name.startswith(("PARAMKIT_", "NVCC_")):
            monkeypatch.delenv(name)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def nvcc(csrc: Path, tmp_path: Path) -> FakeNvcc:
    """An nvcc in the usual place."""
    return FakeNvcc(tmp_path / "usual")


@pytest.fixture
def build(csrc: Path, tmp_path: Path) -> Build:
    """Build the library into a new folder that already has an extension; returns the record's entry."""
    count = 0

    def run(*others: Path, temp: str = "temp", say: Any = lambda line: None) -> dict[str, Any]:
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        out.mkdir()
        sources.write_record(out / sources.RECORD_NAME, {"result": "built"})
        log = tmp_path / "build.log"
        entry = compile_cuda.compile_library(out, tmp_path / temp, log, say, others)
        record = sources.read_record(out / sources.RECORD_NAME)
        assert record == {"result": "built", "cuda": entry}
        library = out / sources.CUDA_NAME
        assert library.is_file() == (entry["result"] == "built")
        if library.is_file():
            assert entry["sha256"] == sources.file_digest(library)
        assert f"the CUDA library: {entry['result']}" in log.read_text().splitlines()[-1]
        return entry

    return run


# --- nvcc: where it is, what it knows -----------------------------------------------------------


def test_where_nvcc_is_looked_for(csrc: Path, tmp_path: Path) -> None:
    assert toolkit.find_nvcc() is None
    usual = FakeNvcc(tmp_path / "usual")
    assert toolkit.find_nvcc({}) == usual.path
    on_path, by_path, by_home = (FakeNvcc(tmp_path / name) for name in "abc")
    environ = {"PATH": str(on_path.path.parent)}
    assert toolkit.find_nvcc(environ) == on_path.path
    environ["CUDA_PATH"] = str(by_path.home)
    assert toolkit.find_nvcc(environ) == by_path.path
    environ["CUDA_HOME"] = str(tmp_path / "nowhere")
    assert toolkit.find_nvcc(environ) == by_path.path
    environ["CUDA_HOME"] = str(by_home.home)
    assert toolkit.find_nvcc(environ) == by_home.path


def test_by_default_all_architectures_that_nvcc_knows(nvcc: FakeNvcc) -> None:
    assert toolkit.version(nvcc.path) == VERSION
    flags = toolkit.targets(nvcc.path, {"TORCH_CUDA_ARCH_LIST": ""})
    assert flags == TARGETS
    assert toolkit.architectures(flags) == ARCHITECTURES


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("8.0;9.0+PTX", ["80", "90", "90+PTX"]),
        ("7.5 9.0a", ["75", "90a"]),
        ("Turing", ["75", "75+PTX"]),
    ],
)
def test_the_architectures_that_torch_makes_of_its_variable(
    nvcc: FakeNvcc, wanted: str, expected: list[str]
) -> None:
    flags = toolkit.targets(nvcc.path, {**os.environ, "TORCH_CUDA_ARCH_LIST": wanted})
    assert toolkit.architectures(flags) == expected


def test_an_architecture_that_torch_does_not_know(
    nvcc: FakeNvcc, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;bogus")
    with pytest.raises(toolkit.ToolkitError, match=r"TORCH_CUDA_ARCH_LIST: got '9.0;bogus'.*bogus"):
        toolkit.targets(nvcc.path)
    assert "TORCH_CUDA_ARCH_LIST: got '9.0;bogus'" in build()["reason"]
    monkeypatch.setenv("PARAMKIT_CUDA", "require")
    with pytest.raises(compile_cuda.CudaError, match="TORCH_CUDA_ARCH_LIST"):
        build()
    assert not nvcc.compilations()


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["75", "80"], (8, 9), True),  # machine code of the same major version
        (["89"], (8, 6), False),  # of a newer GPU
        (["80"], (9, 0), False),
        (["80+PTX"], (9, 0), True),
        (["90+PTX"], (8, 0), False),
        (["120"], (12, 1), True),
        (["90a"], (9, 0), True),
        (["100a"], (10, 3), False),
        ([], (8, 0), False),
    ],
)
def test_which_gpus_a_library_is_for(
    built_for: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert toolkit.covers(built_for, capability) == runs


# --- what is built ------------------------------------------------------------------------------


def test_a_library_is_built_and_recorded(nvcc: FakeNvcc, build: Build, csrc: Path) -> None:
    said: list[str] = []
    entry = build(say=said.append)
    assert (entry["result"], entry["reason"]) == ("built", "")
    assert (entry["toolkit"], entry["architectures"]) == (VERSION, ARCHITECTURES)
    figures = {"registers": 40, "spill_stores": 0, "spill_loads": 0, "stack": 16, "shared": 8448}
    assert entry["kernels"] == {
        "75": figures,
        "80": {**figures, "registers": 255, "spill_stores": 8},  # the most, over its kernels
        "90": {**figures, "registers": 42},
    }
    assert said[1:] == ["[1/3] cuda/sm_75", "[2/3] cuda/sm_80", "[3/3] cuda/sm_90"]
    (command,) = nvcc.compilations()
    words = command.split()
    assert [word for word in words if word.startswith("-gencode")] == TARGETS
    assert [word for word in words if word.endswith((".cu", ".cpp"))] == [
        str(csrc / "cuda" / "launch.cu")
    ]
    for flags in ("-std=c++17 -O3 -shared -cudart static -Xptxas -v", f"-I{csrc}", "-fPIC"):
        assert flags in command
    assert f"--threads {os.cpu_count()}" in command
    assert "fast" not in command and "-Werror" not in command and "-ccbin" not in command


def test_settings_reach_nvcc(nvcc: FakeNvcc, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setenv("PARAMKIT_WERROR", "1")
    monkeypatch.setenv("CXX", "g++-13")
    build()
    monkeypatch.setenv("CXX", "ccache g++")  # nvcc takes a compiler, not a command
    build()
    first, second = nvcc.compilations()
    assert "--threads 3" in first and "-ccbin g++-13" in first and "-ccbin" not in second
    assert "--Werror all-warnings" in first
    assert "-Xcompiler -fPIC,-Wall,-Wextra,-fvisibility=hidden,-Werror" in first


def test_a_library_is_compiled_once_for_each_change(
    nvcc: FakeNvcc,
    build: Build,
    csrc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = build()
    assert build() == first
    (csrc / "core" / "task.h").write_text("// no CUDA source includes this")
    assert build() == first
    assert len(nvcc.compilations()) == 1
    # In another folder than the one where it was compiled.
    assert build(tmp_path / "nowhere", tmp_path / "out1", temp="other") == first
    assert len(nvcc.compilations()) == 1

    (csrc / "core" / "dtypes.h").write_text("// changed")
    assert build()["inputs"] != first["inputs"]
    assert len(nvcc.compilations()) == 2
    # One that gave no warnings is as good where warnings are no errors; the reverse is not known.
    monkeypatch.setenv("PARAMKIT_WERROR", "1")
    assert build()["werror"]
    monkeypatch.delenv("PARAMKIT_WERROR")
    assert build()["werror"]
    assert len(nvcc.compilations()) == 3
    nvcc.path.write_text(nvcc.path.read_text().replace(VERSION, "12.5.40"))
    assert build()["toolkit"] == "12.5.40"
    assert len(nvcc.compilations()) == 4
    # A damaged one is not taken.
    (tmp_path / "temp" / sources.CUDA_NAME).write_bytes(b"damaged")
    build()
    assert len(nvcc.compilations()) == 5


def test_sources_that_are_edited_meanwhile(
    nvcc: FakeNvcc, build: Build, csrc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source = compile_cuda._run_nvcc, csrc / "core" / "dtypes.h"
    text = source.read_text()

    def edit(*arguments: Any) -> str:
        source.write_text("// changed")
        return run(*arguments)

    with monkeypatch.context() as context:
        context.setattr(compile_cuda, "_run_nvcc", edit)
        assert build()["result"] == "built"
    build()
    source.write_text(text)
    build()
    assert len(nvcc.compilations()) == 3  # the first was taken for neither


# --- modes --------------------------------------------------------------------------------------


def test_without_nvcc(csrc: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = build()
    assert entry["result"] == "none"
    assert entry["reason"].startswith("no nvcc was found (looked in CUDA_HOME, CUDA_PATH, PATH and")
    monkeypatch.setenv("PARAMKIT_BUILD", "require")  # asks for the extension
    assert build()["result"] == "none"
    monkeypatch.setenv("PARAMKIT_CUDA", "require")
    for function in (lambda: compile_cuda.check_settings(csrc), build):
        with pytest.raises(compile_cuda.CudaError, match="no nvcc was found"):
            function()


def test_off(nvcc: FakeNvcc, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMKIT_CUDA", "off")
    assert build() == {"result": "off", "reason": "PARAMKIT_CUDA=off"}
    assert not nvcc.compilations()


def test_an_unknown_mode(csrc: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMKIT_CUDA", "on")
    with pytest.raises(ValueError, match="PARAMKIT_CUDA: got 'on', expected one of auto, require"):
        build()


def test_sources_without_cuda(nvcc: FakeNvcc, build: Build, csrc: Path) -> None:
    (csrc / "cuda" / "launch.cu").unlink()
    assert build() == {"result": "none", "reason": "there are no CUDA sources"}


@pytest.mark.parametrize("required", ["", "PARAMKIT_CUDA", "PARAMKIT_BUILD"])
def test_an_nvcc_that_fails(
    nvcc: FakeNvcc,
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    required: str,
) -> None:
    nvcc.fail()
    error = 'launch.cu(8): error: identifier "b" is undefined'
    if required:
        monkeypatch.setenv(required, "require")
        with pytest.raises(compile_cuda.CudaError) as caught:
            build()
        assert str(caught.value) == error and "1 error detected" in caught.value.output
    else:
        assert build() == {"result": "failed", "reason": error}
    log = (tmp_path / "build.log").read_text()
    assert "1 error detected" in log and str(nvcc.path) in log
    assert not list((tmp_path / "temp").iterdir())


def test_an_nvcc_that_cannot_be_run(nvcc: FakeNvcc, build: Build) -> None:
    nvcc.path.write_text("#!/no/such/interpreter\n")
    entry = build()
    assert entry["result"] == "failed" and "No such file" in entry["reason"]


def test_when_a_library_is_built_again(
    nvcc: FakeNvcc, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"cuda": build()}
    folder = tmp_path / "out1"

    def good(result: str = "") -> bool:
        return compile_cuda.is_good(folder, {"cuda": {"result": result}} if result else record)

    assert good()
    assert not good("none") and not good("failed") and not good("off")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert not good()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")

    monkeypatch.setenv("PARAMKIT_CUDA", "off")
    assert not good() and good("off") and good("none")
    monkeypatch.delenv("PARAMKIT_CUDA")

    # Without nvcc there is nothing that a build could do better.
    nvcc.path.unlink()
    assert good() and good("none") and good("failed") and good("off")
    monkeypatch.setenv("PARAMKIT_CUDA", "require")
    assert good() and not good("none") and not good("failed")
    monkeypatch.delenv("PARAMKIT_CUDA")

    library = folder / sources.CUDA_NAME
    library.write_bytes(b"damaged")
    assert not good()
    library.unlink()
    assert not good()


# --- installing, and `paramkit build` -----------------------------------------------------------

USED = "import paramkit; print(paramkit.status().cuda); print(paramkit.status().binary)"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    add_cuda(project)
    return project


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Settings with which a project finds no nvcc."""
    return {"PATH": path_without_nvcc(tmp_path / "bare")}


def _record(project: Project) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((project.package / "_C.json").read_text())
    return record


def test_installing_with_and_without_nvcc(
    project: Project, bare: dict[str, str], tmp_path: Path
) -> None:
    nvcc = FakeNvcc(tmp_path / "toolkit")
    library = project.package / "_cuda.so"
    with_nvcc = {**bare, "CUDA_HOME": str(nvcc.home)}
    status, output = project.install(**with_nvcc)
    assert status == 0, output
    entry = _record(project)["cuda"]
    assert entry["result"] == "built" and entry["sha256"] == sources.file_digest(library)
    log = Path(_record(project)["log"]).read_text()
    assert "_C" in log and "ptxas info" in log
    status, output = project.install(**with_nvcc)
    assert status == 0 and len(nvcc.compilations()) == 1, output
    told = project.python(USED).splitlines()[0]
    assert told.startswith("built with CUDA 12.4 for 3 architectures; ")

    # One that fails leaves the extension, and nothing of the earlier library.
    (project.root / "csrc" / "cuda" / "launch.cu").write_text("// changed\n")
    nvcc.fail()
    status, output = project.install(**with_nvcc)
    assert status == 0 and "warning: paramkit is installed without its CUDA library" in output
    assert _record(project)["cuda"]["result"] == "failed" and not library.exists()
    assert 'no library: building it failed (launch.cu(8): error: identifier "b"' in project.python(
        USED
    )
    assert list(project.package.glob("_C*.so"))
    for setting in ("PARAMKIT_BUILD", "PARAMKIT_CUDA"):
        status, output = project.install(**with_nvcc, **{setting: "require"})
        assert status != 0 and f"error: {setting}=require, and the CUDA library did not" in output

    status, output = project.install(**bare)
    assert status == 0, output
    assert _record(project)["cuda"]["result"] == "none"
    told = project.python(USED, **bare).splitlines()[0]
    assert told.startswith("no library: not built (no nvcc was found (looked in CUDA_HOME,")


def test_installing_with_settings_that_cannot_be_met(
    project: Project, bare: dict[str, str]
) -> None:
    status, output = project.install(**bare, PARAMKIT_CUDA="require")
    assert status != 0
    assert "PARAMKIT_CUDA=require, and the CUDA library did not build: no nvcc was found" in output
    assert "core/tiny.cpp" not in output  # told at once
    status, output = project.install(**bare, PARAMKIT_CUDA="yes")
    assert status != 0
    assert "PARAMKIT_CUDA: got 'yes', expected one of auto, require, off" in output
    status, output = project.install(**bare, PARAMKIT_CUDA="require", PARAMKIT_BUILD="off")
    assert status != 0 and "nothing is built with PARAMKIT_BUILD=off" in output


def test_a_wheel_has_the_library(project: Project, bare: dict[str, str], tmp_path: Path) -> None:
    nvcc = FakeNvcc(tmp_path / "toolkit")
    (project.package / "_cuda.so").write_text("of the checkout, not of the wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", str(tmp_path / "out"), "."],
        cwd=project.root,
        env=project.environ(**bare, CUDA_HOME=str(nvcc.home)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    record = json.loads((site / "paramkit" / "_C.json").read_text())
    assert record["cuda"]["sha256"] == sources.file_digest(site / "paramkit" / "_cuda.so")
    assert (site / "paramkit" / "csrc" / "cuda" / "launch.cu").is_file()


def test_paramkit_build_adds_the_library(
    project: Project, bare: dict[str, str], tmp_path: Path
) -> None:
    status, output = project.install(**bare)
    assert status == 0, output
    status, output = project.build(**bare)
    assert status == 0 and "without the CUDA library: no nvcc was found" in output
    status, output = project.build(**bare)
    assert "already built" in output

    # With an nvcc, it is built again; and that is used instead of what was installed without.
    nvcc = FakeNvcc(tmp_path / "toolkit")
    with_nvcc = {**bare, "CUDA_HOME": str(nvcc.home)}
    status, output = project.build(**with_nvcc)
    assert status == 0 and "[3/3] cuda/sm_90" in output
    (folder,) = {path.parent for path in project.binaries()}
    assert (folder / "_cuda.so").is_file()
    told, binary = project.python(USED).splitlines()
    assert told.startswith("built with CUDA 12.4 for 3 architectures")
    assert Path(binary).parent == folder
    status, output = project.build(**with_nvcc)
    assert "already built" in output

    # A damaged library is noticed. One from the same sources is taken again, unless it is forced.
    (folder / "_cuda.so").write_bytes(b"damaged")
    status, output = project.build(**with_nvcc)
    assert status == 0 and len(nvcc.compilations()) == 2
    project.source.write_text(project.source.read_text() + "// changed\n")
    status, output = project.build(**with_nvcc)
    assert status == 0 and "taken again" in output and len(nvcc.compilations()) == 2
    status, output = project.build("--force", **with_nvcc)
    assert status == 0 and len(nvcc.compilations()) == 3

    # A failure is told, and one that must not be is an error.
    (project.root / "csrc" / "cuda" / "launch.cu").write_text("// changed\n")
    nvcc.fail()
    status, output = project.build(**with_nvcc, PARAMKIT_CUDA="require")
    assert status == 1 and "build: the CUDA library did not build: launch.cu(8): error" in output
    assert "PARAMKIT_CUDA=off" in output and "Traceback" not in output
    status, output = project.build(**with_nvcc)
    assert status == 0 and "warning: without the CUDA library: launch.cu(8): error" in output
    status, output = project.build(**bare, PARAMKIT_CUDA="maybe")
    assert status == 1 and "PARAMKIT_CUDA: got 'maybe'" in output


# --- the library that is there ------------------------------------------------------------------


def test_the_library_in_use_is_whole() -> None:
    """The real one: every architecture that this nvcc knows, and kernels that spill nothing."""
    need_extension()
    with paramkit.backend.force("cpu"):
        binary = Path(paramkit.status().binary or "")
    entry = (sources.read_record(binary.parent / sources.RECORD_NAME) or {}).get("cuda") or {}
    nvcc = toolkit.find_nvcc()
    if entry.get("result") != "built":
        told = f"no CUDA library: {entry.get('reason', 'the record tells of none')}"
        if nvcc is not None and must_have_extension():
            pytest.fail(told, pytrace=False)
        pytest.skip(told)
    assert entry["sha256"] == sources.file_digest(binary.parent / sources.CUDA_NAME)
    if nvcc is not None and toolkit.version(nvcc) == entry["toolkit"] and not entry["arch_list"]:
        known = toolkit.architectures(toolkit.targets(nvcc, {}))
        assert set(known) <= set(entry["architectures"])
    machine = [name for name in entry["architectures"] if not name.endswith("+PTX")]
    assert sorted(entry["kernels"]) == sorted(machine)
    for name, figures in entry["kernels"].items():
        assert figures["registers"] > 0, name
        assert (figures["spill_stores"], figures["spill_loads"]) == (0, 0), name
