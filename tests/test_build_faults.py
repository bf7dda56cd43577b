"""Building and finding what was built, where the machine fails: kills, full disks, damage, races.

Most of it needs no compiler: `QuickCompiler` stands in for it, in this process or in a fork of it. What
depends on the compiler or on the dynamic loader runs in a process of its own, on a copy of the project.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import paramkit
from paramkit.backend import BackendError, BuildError, elf, loader, sources
from tests.disks import largest_file, small_disk
from tests.quick_compiler import QuickCompiler
from tests.tiny import Project

USED = "import paramkit; print(paramkit.backend.active().__name__)"


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_loader: None) -> QuickCompiler:
    return QuickCompiler(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def installed_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("installed"))
    status, output = project.install()
    assert status == 0, output
    return project


@pytest.fixture
def installed(installed_once: Project, tmp_path: Path) -> Project:
    return installed_once.copy(tmp_path)


# --- killed -------------------------------------------------------------------------------------


# What the file system is changed by, as the interpreter tells it; what is in an open file, beside the others.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "os.truncate", "os.chmod"}
SWAP = "renameat2"


def _dying(step: int, told: int) -> None:
    """Kill this process, as by `kill -9`, before its n-th change of the file system from now on.

    A file opened to be written counts twice: before it is opened, and while it is empty.

    Args:
        step: n.
        told: a descriptor, to which the name of that change goes.
    """
    left = step

    def reached(name: str) -> bool:
        nonlocal left
        left -= 1
        if left == -1:
            os.write(told, name.encode())
        return left == -1

    def changed(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
            if reached("open"):
                os.kill(os.getpid(), signal.SIGKILL)
            if reached("write"):
                os.open(path, flags, 0o666)
                os.kill(os.getpid(), signal.SIGKILL)
        elif event == "ctypes.dlsym" and args[1] == SWAP:  # looked up to be called
            if reached(SWAP):
                os.kill(os.getpid(), signal.SIGKILL)
        elif event in CHANGES and reached(event):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(changed)


@pytest.mark.parametrize("before", ["nothing", "another build"])
def test_killed_at_any_step(quick: QuickCompiler, before: str) -> None:
    """Whatever a killed build leaves is either not used or whole, and the next build puts it right."""
    if before == "another build":
        quick.build()
    killed: list[str] = []
    for step in range(200):
        quick.content = f"binary {step}".encode()

        reading, telling = os.pipe()

        def build_and_die(step: int = step, telling: int = telling) -> None:
            _dying(step, telling)
            quick.build(force=True)

        status = quick.in_child(build_and_die)
        os.close(telling)
        with os.fdopen(reading) as pipe:
            name = pipe.read()
        if status == 0:
            break
        assert status == -signal.SIGKILL and name
        killed.append(name)
        # An earlier build stays good to the moment when the new one takes its place.
        assert quick.problem() == "" or before == "nothing"
        if not quick.problem():
            assert quick.binary.read_bytes() in (b"binary", quick.content)
        quick.content = b"binary"
        quick.build()
        assert quick.problem() == ""
        left = [*quick.cache.iterdir(), *quick.folder.iterdir()]
        names = {"build.log", sources.BINARY_NAME, sources.RECORD_NAME, ".lock", quick.folder.name}
        assert {path.name for path in left} == names
        if before == "nothing":
            for path in quick.folder.iterdir():
                path.unlink()
            quick.folder.rmdir()
    assert status == 0
    # The removal of what it worked in is the last.
    assert {"os.mkdir", "open", "write", "os.rename", "os.remove"} <= set(killed)
    assert killed[-1] == "os.rmdir" and (SWAP in killed) == (before == "another build")


@pytest.mark.slow
def test_a_killed_build_may_go_on_writing_for_a_while(tmp_path: Path) -> None:
    """The compilers that it started are no longer anybody's; the next build is not disturbed by them."""
    project = Project(tmp_path)
    compiler = tmp_path / "g++"
    started = tmp_path / "started"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) echo $$ > {started}; sleep 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    process = project.start("-m", "paramkit", "build", CXX=str(compiler))
    try:
        while not started.exists() or not started.read_text():
            assert process.poll() is None
            threading.Event().wait(0.02)
    finally:
        process.kill()
        process.wait()
    status, output = project.build(CXX=str(compiler))
    assert status == 0, output
    assert not list(project.cache.glob("paramkit/.building-*"))
    assert "paramkit._C" in project.python(USED)


def test_a_build_that_is_given_up_leaves_no_compiler(tmp_path: Path) -> None:
    from paramkit.backend.compile import run_logged

    alive = tmp_path / "pid"

    def full(line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # A program that starts another one, as ninja starts the compiler.
    command = ["sh", "-c", f"sleep 60 & echo $! > {alive}; echo line; wait"]
    with pytest.raises(OSError, match="No space left"):
        run_logged(command, tmp_path, tmp_path / "log", full)
    grandchild = int(alive.read_text())
    for _ in range(100):
        state = Path(f"/proc/{grandchild}/stat")
        if not state.exists() or state.read_text().split(") ")[1][0] == "Z":
            break
        threading.Event().wait(0.02)
    else:
        os.kill(grandchild, signal.SIGKILL)
        pytest.fail("it is still running")


# --- at once ------------------------------------------------------------------------------------


def test_builds_at_once_and_readers(quick: QuickCompiler) -> None:
    """Four processes build again and again; who looks meanwhile finds a whole build, every time."""
    quick.content = bytes(range(256)) * 1024
    quick.build()

    def build() -> None:
        for _ in range(10):
            quick.build(force=True)

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                build()
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    looked, problems = 0, []
    left = set(children)
    while left:
        problems += [problem] if (problem := quick.problem()) else []
        looked += 1
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                assert status == 0
    assert looked > 10 and problems == []
    assert sorted(path.name for path in quick.cache.iterdir()) == [".lock", quick.folder.name]


def test_the_second_of_two_waits_and_builds_nothing(quick: QuickCompiler) -> None:
    second: list[Path] = []
    waiting = threading.Event()

    def other() -> None:
        waiting.set()
        second.append(quick.build())

    thread = threading.Thread(target=other)

    def start_the_other() -> None:
        thread.start()
        waiting.wait()
        threading.Event().wait(0.05)
        assert second == []  # it waits for the lock

    quick.meanwhile = start_the_other
    first = quick.build()
    thread.join()
    assert second == [first] and quick.compiled == 1


@pytest.mark.slow
def test_installing_twice_at_once(tmp_path: Path) -> None:
    """Two installations from one checkout compile in one folder: one after the other."""
    project = Project(tmp_path)
    arguments = ("setup.py", "-q", "build_ext", "--inplace")
    both = [project.start(*arguments) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "paramkit._C" in project.python(USED)


# --- the lock -----------------------------------------------------------------------------------


def test_a_lock_file_that_was_left_blocks_nobody(quick: QuickCompiler) -> None:
    quick.cache.mkdir(parents=True)
    (quick.cache / ".lock").write_text("4711\n")
    os.utime(quick.cache / ".lock", (0, 0))
    quick.build()
    assert quick.problem() == ""


@pytest.mark.parametrize("what", ["a folder", "a file system without locks"])
def test_a_lock_that_cannot_be_had(
    quick: QuickCompiler, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "a folder":
        (quick.cache / ".lock").mkdir(parents=True)
    else:
        import fcntl

        def refuse(handle: int, how: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BuildError, match="TORCH_EXTENSIONS_DIR"):
        quick.build()
    assert quick.compiled == 0


# --- damage -------------------------------------------------------------------------------------

NESTED = "[" * 100_000
RECORDS: dict[str, str | bytes] = {
    "empty": "",
    "half": '{"result": "built", "torch',
    "no text": b"\xff\xfe\x00binary",
    "nested": NESTED,
    "nested in the middle": '{"result": "built", "flags": ' + NESTED,
    "a huge number": '{"time": ' + "9" * 10_000 + "}",
    "a list": "[]",
    "null": "null",
    "no entries": "{}",
    "of another form": '{"result": "built", "extension": {"torch": "2.0"}}',
}
WRONG = {
    "result": 1,
    "torch": None,
    "python": ["x"],
    "source_hash": 5,
    "sha256": 5,
    "compiler": {},
    "flags": None,
    "time": 5,
    "log": 5,
    "cuda": "built",
}
WRONG_CUDA = {
    "result": [],
    "reason": 1,
    "toolkit": 12.4,
    "architectures": [90],
    "arch_list": None,
    "inputs": 1,
    "sha256": 1,
    "werror": "yes",
    "kernels": [],
}


def _check_that_damage_is_survived(quick: QuickCompiler) -> None:
    """It is not used, it is told, nothing raises, and a build puts it right."""
    assert quick.problem() != ""
    with pytest.warns(RuntimeWarning, match="paramkit build"):
        assert paramkit.backend.active().NAME == "native"
    assert str(quick.folder) in str(paramkit.status())
    quick.build()
    assert quick.problem() == ""
    assert json.loads(quick.record.read_text())["result"] == "built"


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record(quick: QuickCompiler, name: str) -> None:
    quick.build()
    content = RECORDS[name]
    quick.record.write_bytes(content if isinstance(content, bytes) else content.encode())
    _check_that_damage_is_survived(quick)


@pytest.mark.parametrize("entry", [*WRONG, *(f"cuda.{name}" for name in WRONG_CUDA)])
def test_a_record_with_an_entry_of_another_type(quick: QuickCompiler, entry: str) -> None:
    quick.build()
    record = json.loads(quick.record.read_text())
    if entry.startswith("cuda."):
        name = entry.removeprefix("cuda.")
        record["cuda"] = {"result": "built", "reason": "", name: WRONG_CUDA[name]}
    else:
        record[entry] = WRONG[entry]
    quick.record.write_text(json.dumps(record))
    _check_that_damage_is_survived(quick)
    # The same record in the package, beside a binary.
    loader.reset()
    quick.binary.unlink()
    (quick.package / sources.BINARY_NAME).write_bytes(b"binary")
    (quick.package / sources.RECORD_NAME).write_text(json.dumps(record))
    assert paramkit.status().backend == "native"
    assert "that can be read" in paramkit.status().why


@pytest.mark.parametrize("how", ["half", "empty", "a bit", "longer", "a folder", "a dead link"])
def test_a_damaged_binary_in_the_cache(quick: QuickCompiler, how: str) -> None:
    quick.content = bytes(range(256)) * 64
    quick.build()
    content = bytearray(quick.content)
    content[1000] ^= 1
    damaged = {"half": content[:8192], "empty": b"", "a bit": content, "longer": content + b"\0"}
    quick.binary.unlink()
    if how in damaged:
        quick.binary.write_bytes(damaged[how])
    elif how == "a folder":
        quick.binary.mkdir()
    else:
        quick.binary.symlink_to(quick.binary.with_name("nowhere"))
    if how == "a dead link":
        assert not quick.problem() or not quick.binary.exists()
        quick.build()
        assert quick.problem() == "" and quick.binary.read_bytes() == quick.content
    else:
        _check_that_damage_is_survived(quick)


@pytest.mark.parametrize("system", ["swaps", "only renames"])
def test_a_file_where_the_build_belongs(
    quick: QuickCompiler, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    if system == "only renames":
        library = SimpleNamespace(renameat2=lambda *arguments: -1)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    quick.cache.mkdir(parents=True)
    quick.folder.write_text("no folder")
    assert paramkit.status().backend == "native"
    for content in (b"first", b"second"):
        quick.content = content
        quick.build(force=True)
        assert quick.problem() == "" and quick.binary.read_bytes() == content
        assert sorted(path.name for path in quick.cache.iterdir()) == [".lock", quick.folder.name]


def test_a_library_that_was_cut_short_is_not_opened(installed: Project) -> None:
    """Opening one kills the process by SIGBUS; what the headers tell is looked at first."""
    (binary,) = installed.package.glob("_C*.so")
    content = binary.read_bytes()
    sizes = range(64, len(content) + 1)
    needed = sizes[bisect.bisect_left(sizes, 1, key=lambda n: not _cut(binary, content, n))]
    assert 4096 < needed <= len(content)
    sizes = [64, 200, 1000, needed // 2, needed - 4096, needed - 1]
    for size in sizes:
        assert f"ends after {size} bytes" in _cut(binary, content, size)
    # Without that look: the canary.
    binary.write_bytes(content[: needed // 2])
    status, _ = installed.run("-c", f"import ctypes; ctypes.CDLL({str(binary)!r})")
    assert status != 0
    output = installed.python(f"{USED}; print(paramkit.status())")
    assert output.count("RuntimeWarning") == 1 and "paramkit.backend.native" in output
    assert f"ends after {needed // 2} bytes" in output


def _cut(path: Path, content: bytes, size: int) -> str:
    path.write_bytes(content[:size])
    return elf.cut_short(path)


def test_any_bytes_may_be_asked_about(tmp_path: Path) -> None:
    """Headers are read from a file that may hold anything."""
    path = tmp_path / "library.so"
    whole = Path(sys.executable).resolve().read_bytes()[:4096]
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        content = bytearray(whole)
        for at in torch.randint(6, 120, (4,), generator=generator).tolist():
            content[at] = int(torch.randint(0, 256, (), generator=generator))
        path.write_bytes(content)
        assert isinstance(elf.cut_short(path), str)
    for content in (b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 58, b"no library" * 100):
        path.write_bytes(content)
        assert isinstance(elf.cut_short(path), str)


# --- full disks, folders that cannot be written -------------------------------------------------


@pytest.mark.parametrize("how", ["a disk", "a limit"])
def test_a_disk_that_fills_up(quick: QuickCompiler, how: str) -> None:
    limited = how == "a limit"
    told = "File too large" if limited else "No space left on device"
    with nullcontext() if limited else small_disk(quick.root, "64k"):
        quick.build()
        quick.content = bytes(1 << 20)
        limit = largest_file(1 << 16) if limited else nullcontext()
        with limit, pytest.raises(BuildError, match=told):
            quick.build(force=True)
        # The build that was there is still there, and the disk has room again.
        assert quick.problem() == "" and quick.binary.read_bytes() == b"binary"
        assert not list(quick.cache.glob(".building-*"))
        quick.content = bytes(8192)
        quick.build(force=True)
        assert quick.problem() == "" and quick.binary.stat().st_size == 8192


@pytest.mark.parametrize("how", ["a disk", "a limit"])
def test_a_disk_that_is_full_from_the_start(quick: QuickCompiler, how: str) -> None:
    with ExitStack() as stack:
        if how == "a limit":
            stack.enter_context(largest_file(0))
        else:
            disk = stack.enter_context(small_disk(quick.root, "64k"))
            with pytest.raises(OSError), (disk / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        with pytest.raises(BuildError, match="TORCH_EXTENSIONS_DIR"):
            quick.build()
        assert paramkit.status().backend == "native"


@pytest.mark.slow
def test_sources_that_change_meanwhile(tmp_path: Path) -> None:
    """The binary would be of neither; it must not pass for one of the sources as they are now."""
    project = Project(tmp_path)
    compiler = tmp_path / "g++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) echo "// changed" >> {project.source};; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    status, output = project.build(CXX=str(compiler))
    assert status == 1 and "changed while they were compiled" in output, output
    assert not project.binaries()
    assert project.build()[0] == 0


@pytest.mark.slow
def test_the_compiler_cannot_write(tmp_path: Path) -> None:
    """A limit on the size of files, as a full disk for the compiler's own output."""
    project = Project(tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    done = subprocess.run(
        [sys.executable, "-m", "paramkit", "build"],
        cwd=project.root,
        env=project.environ(PYTHONDONTWRITEBYTECODE="1"),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "Traceback (most recent call last)" not in output.partition("What to do")[2]
    assert "error" in output and not project.binaries()
    assert not list(project.cache.glob("paramkit/.building-*"))
    assert "paramkit.backend.native" in project.python(USED)


def _without_override() -> None:
    """Let permissions hold for root too: gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH at exec."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; fails for others, who never had it


def test_folders_that_cannot_be_written(installed: Project) -> None:
    folders = [installed.package, *installed.package.rglob("*/"), installed.root, installed.cache]
    installed.cache.mkdir()
    for folder in folders:
        folder.chmod(0o555)
    code = (
        "import os, pathlib, paramkit, torch\n"
        "package = pathlib.Path(paramkit.__file__).parent\n"
        "try:\n    (package / 'x').touch()\n    print('it can be written')\n"
        "except PermissionError:\n    pass\n"
        "print(paramkit.backend.active().__name__)\n"
        "try:\n    paramkit.backend.build(verbose=False)\n"
        "except paramkit.backend.BuildError as error:\n    print(error)\n"
        "print(paramkit.status().backend)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd="/",
            env=installed.environ(),
            preexec_fn=_without_override,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    if "it can be written" in done.stdout:
        pytest.skip("permissions do not hold here")
    used, *told, status = done.stdout.splitlines()
    assert (used, status) == ("paramkit._C", "cpu")
    assert "Permission denied" in "".join(told) and "TORCH_EXTENSIONS_DIR" in "".join(told)


# --- another torch, another Python --------------------------------------------------------------


def test_another_torch_has_its_own_build(
    quick: QuickCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quick.build()
    monkeypatch.setattr(torch, "__version__", "9.9.0+cpu")
    assert quick.problem() == "the extension has not been built"
    assert paramkit.status().backend == "native"
    second = quick.build()
    assert first != second and quick.problem() == ""
    monkeypatch.undo()
    assert first.is_file() and second.is_file()


@pytest.mark.parametrize(
    ("entry", "value", "told"),
    [
        ("torch", "1.0.0", "built for torch 1.0.0, and this is"),
        ("python", ".cpython-39-x86_64-linux-gnu.so", "built for .cpython-39-x86_64-linux-gnu.so"),
    ],
)
def test_a_build_for_another_is_never_opened(
    quick: QuickCompiler, monkeypatch: pytest.MonkeyPatch, entry: str, value: str, told: str
) -> None:
    """Also where it got to where one for this torch belongs, by a copied home folder say."""
    quick.build()
    record = json.loads(quick.record.read_text())
    quick.record.write_text(json.dumps({**record, entry: value}))
    opened: list[Path] = []
    monkeypatch.setattr(loader, "_load", opened.append)
    with pytest.warns(RuntimeWarning, match="paramkit build"):
        assert paramkit.backend.active().NAME == "native"
    assert told in paramkit.status().why and opened == []


# --- a Python without the GIL -------------------------------------------------------------------


@pytest.fixture
def gil(monkeypatch: pytest.MonkeyPatch, fresh_loader: None) -> Callable[[bool], None]:
    """Have a free-threaded Python, with its GIL on or off."""
    for name in ("PARAMKIT_BACKEND", "PARAMKIT_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)

    def turn(on: bool) -> None:
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: on, raising=False)

    return turn


def test_without_the_gil_the_extension_is_left_alone(
    gil: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gil(False)
    monkeypatch.setattr(loader, "_find", lambda: pytest.fail("it was looked for"))
    with pytest.warns(RuntimeWarning, match="turns the GIL on for the whole process"):
        assert paramkit.backend.active().NAME == "native"
    status = paramkit.status()
    assert "free-threaded" in status.why and "PARAMKIT_BACKEND=cpu" in str(status.remedy)
    assert "paramkit build" not in str(status)


@pytest.mark.parametrize("allowed", [True, False])
def test_asked_for_by_name_it_needs_the_gil(
    gil: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """Python turns the GIL on when the module is loaded, but not with PYTHON_GIL=0."""
    module: Any = type(sys)("extension")
    module.capability, module.capabilities = lambda: "avx2", lambda: ["avx2"]

    def find() -> loader.Extension:
        gil(allowed)
        return loader.Extension(module, Path("extension.so"), where="here")

    gil(False)
    monkeypatch.setattr(loader, "_find", find)
    monkeypatch.setenv("PARAMKIT_BACKEND", "cpu")
    if allowed:
        assert paramkit.backend.active() is module
    else:
        with pytest.raises(BackendError, match="PYTHON_GIL"):
            paramkit.backend.active()
        assert paramkit.status().backend == "none"


def test_the_module_does_not_claim_to_be_safe_without_the_gil() -> None:
    csrc = sources.csrc_dir()
    assert csrc is not None
    text = (csrc / "torch" / "module.cpp").read_text()
    assert "PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, py::mod_gil_not_used(false))" in text
    everything = "".join(path.read_text() for path in csrc.rglob("*.cpp"))
    assert everything.count("mod_gil") == 1 and "Py_MOD_GIL" not in everything
