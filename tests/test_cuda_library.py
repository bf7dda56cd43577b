"""The CUDA library at run time: whether it is opened, why not, what status() and the routes say of it.

The extension is a stand-in, and so is torch's answer on devices: no GPU and no library are needed.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import paramkit
from paramkit.backend import BackendError, cuda, loader, sources

ENTRY = {
    "result": "built",
    "reason": "",
    "toolkit": "13.0.88",
    "architectures": ["75", "80", "90", "90+PTX"],
}
NATIVELY = "CUDA tensors go through torch's own copy_ and fill_"


class Extension(ModuleType):
    """An extension that this process has loaded, as far as CUDA is concerned."""

    def __init__(self, binary: Path) -> None:
        super().__init__("paramkit._C")
        self.__file__ = str(binary)
        self.opened: list[str] = []
        self.enabled = True
        self.refuses = ""

    def capability(self) -> str:
        return "avx2"

    def capabilities(self) -> list[str]:
        return ["scalar", "avx2"]

    def set_capability(self, name: str) -> None:
        pass

    def open_cuda(self, path: str) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.opened.append(path)

    def enable_cuda(self, wanted: bool) -> None:
        self.enabled = wanted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an extension and a library, as after an install."""
    (tmp_path / sources.CUDA_NAME).write_bytes(b"library")
    _record(tmp_path)
    return tmp_path


@pytest.fixture
def extension(folder: Path, fresh_loader: None, monkeypatch: pytest.MonkeyPatch) -> Extension:
    """The extension of that folder, loaded; nobody has asked for the library yet."""
    module = Extension(folder / sources.BINARY_NAME)
    monkeypatch.setitem(sys.modules, "paramkit._C", module)
    for name in ("PARAMKIT_BACKEND", "PARAMKIT_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda, "_outcome", None)
    monkeypatch.setattr(cuda, "_warned", False)
    monkeypatch.setattr(loader, "_cuda_enabled", True)
    return module


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that has a CUDA device, of compute capability 9.0."""
    _device(monkeypatch, (9, 0))


def _device(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


def _no_device(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    _device(monkeypatch)
    if kind == "a build of torch":
        monkeypatch.setattr(torch.version, "cuda", None)

        def never() -> bool:
            raise AssertionError("asked a torch without CUDA for devices")

        monkeypatch.setattr(torch.cuda, "is_available", never)


def _record(folder: Path, **entry: Any) -> None:
    record = {"result": "built", "cuda": {**ENTRY, **entry}}
    sources.write_record(folder / sources.RECORD_NAME, record)


def _described() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paramkit.status().cuda == cuda.describe()
        return cuda.describe()


def test_a_library_is_opened_once(extension: Extension, folder: Path, device: None) -> None:
    built = "built with CUDA 13.0 for 3 architectures"
    assert _described() == f"{built}; to be opened at the first CUDA tensor"
    assert not extension.opened
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.open_library() and cuda.open_library()
    path = folder / sources.CUDA_NAME
    assert extension.opened == [str(path)]
    assert _described() == f"open: {built}: {path}"


@pytest.mark.parametrize(
    ("entry", "reason", "remedy"),
    [
        (
            {"result": "none", "reason": "no nvcc"},
            "not built (no nvcc)",
            "install the CUDA toolkit",
        ),
        ({"result": "failed", "reason": "a.cu: error"}, "failed (a.cu: error)", "put right, run"),
        (
            {"result": None, "reason": None},
            "the extension was built without one",
            "`paramkit build`",
        ),
    ],
)
def test_without_a_library_one_warning_gives_reason_and_remedy(
    extension: Extension,
    folder: Path,
    device: None,
    entry: dict[str, Any],
    reason: str,
    remedy: str,
) -> None:
    _record(folder, **entry)
    with pytest.warns(RuntimeWarning) as caught:
        assert not cuda.open_library()
        assert not cuda.open_library()
    (warning,) = caught
    assert warning.filename == __file__
    assert reason in str(warning.message) and remedy in str(warning.message)
    assert "PARAMKIT_BACKEND=cpu asks for this route" in str(warning.message)
    assert _described().startswith("no library: ") and _described().endswith(NATIVELY)
    assert reason in _described()
    assert not extension.opened


def test_a_library_that_was_declined_gives_no_warning(
    extension: Extension, folder: Path, device: None
) -> None:
    _record(folder, result="off", reason="PARAMKIT_CUDA=off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cuda.open_library()
    assert _described() == f"no library: not built (PARAMKIT_CUDA=off): {NATIVELY}"


def test_a_library_that_is_missing(extension: Extension, folder: Path, device: None) -> None:
    (folder / sources.CUDA_NAME).unlink()
    assert f"{folder / sources.CUDA_NAME} is missing" in _described()
    with pytest.warns(RuntimeWarning, match=r"is missing\. To have it anew, run `paramkit build`"):
        assert not cuda.open_library()


def test_a_library_that_does_not_open(extension: Extension, device: None) -> None:
    extension.refuses = "the driver is too old"
    with pytest.warns(RuntimeWarning, match="cannot be opened: the driver is too old"):
        assert not cuda.open_library()
    assert "; not open: " in _described() and "the driver is too old" in _described()
    extension.refuses = ""  # asked once, and not again
    assert not cuda.open_library() and not extension.opened


@pytest.mark.parametrize("broken", ["no function", "no module", "a record of another kind"])
def test_opening_never_raises(
    extension: Extension,
    folder: Path,
    device: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
) -> None:
    if broken == "no function":
        monkeypatch.delattr(Extension, "open_cuda")
    elif broken == "no module":
        monkeypatch.delitem(sys.modules, "paramkit._C")
    else:
        _record(folder, architectures=None)
    # Not even where warnings are errors: then it is told in another way.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cuda.open_library()
    assert "RuntimeWarning: paramkit leaves CUDA tensors to" in capsys.readouterr().err


def test_a_gpu_that_the_library_has_no_code_for(
    extension: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    _device(monkeypatch, (9, 0), (7, 0))
    with pytest.warns(RuntimeWarning, match=r"no code for .* 7\.0, .*TORCH_CUDA_ARCH_LIST.*'7\.0'"):
        assert not cuda.open_library()
    assert not extension.opened


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("a GPU", "torch has no CUDA device"),
        ("a build of torch", "this torch is built without CUDA"),
    ],
)
def test_without_a_device_nothing_is_opened(
    extension: Extension, monkeypatch: pytest.MonkeyPatch, kind: str, told: str
) -> None:
    _no_device(monkeypatch, kind)
    assert _described() == f"built with CUDA 13.0 for 3 architectures; not opened: {told}"
    message = rf"cuda.*, but {told}\. .*Choices here: auto, native, cpu"
    with pytest.raises(BackendError, match=message), loader.force("cuda"):
        pass
    assert not extension.opened


# --- routes -------------------------------------------------------------------------------------


def test_the_route_cuda(
    extension: Extension, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMKIT_BACKEND", "cuda")
    monkeypatch.setenv("PARAMKIT_CPU_CAPABILITY", "avx2")
    assert loader.active() is extension and len(extension.opened) == 1
    status = paramkit.status()
    assert (status.backend, status.capability) == ("cuda", "avx2")
    assert status.cuda.startswith("open: ") and "PARAMKIT_BACKEND=cuda" in status.why


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"result": "none", "reason": "no nvcc"}, r"not built \(no nvcc\)\. .*`paramkit build`"),
        ({"result": "off", "reason": "PARAMKIT_CUDA=off"}, "unset PARAMKIT_CUDA"),
    ],
)
def test_the_route_cuda_without_a_library(
    extension: Extension,
    folder: Path,
    device: None,
    monkeypatch: pytest.MonkeyPatch,
    entry: dict[str, Any],
    reason: str,
) -> None:
    _record(folder, **entry)
    monkeypatch.setenv("PARAMKIT_BACKEND", "cuda")
    for _ in range(2):
        with pytest.raises(BackendError, match=f"PARAMKIT_BACKEND=cuda, but .*{reason}"):
            loader.active()
    status = paramkit.status()
    assert status.backend == "none" and status.cuda == "not used: the settings cannot be met"
    # The other routes do without.
    monkeypatch.delenv("PARAMKIT_BACKEND")
    assert loader.active() is extension


def test_which_routes_leave_cuda_tensors_alone(extension: Extension, device: None) -> None:
    assert loader.active() is extension and extension.enabled
    with loader.force("cpu:scalar"):
        assert not extension.enabled
        assert _described() == f"not used on this route: {NATIVELY}"
        with loader.force("cuda"):
            assert extension.enabled
        with loader.force("native"):
            assert _described() == f"not used on this route: {NATIVELY}"
            with loader.force("cpu"):
                assert not extension.enabled
        assert not extension.enabled
    assert extension.enabled and "open: " in _described()


def test_the_route_cpu_leaves_cuda_tensors_alone(
    extension: Extension, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMKIT_BACKEND", "cpu")
    assert loader.active() is extension and not extension.enabled
    with loader.force("native"), loader.force("cuda"):
        assert extension.enabled
    assert not extension.enabled
    assert _described() == f"not used on this route: {NATIVELY}"
