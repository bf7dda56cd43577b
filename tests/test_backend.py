"""Which route is taken and why: the environment, force(), status(), the cost of importing."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import paramkit
from paramkit import cli
from paramkit.backend import BackendError, loader, native, sources
from tests.conftest import need_extension
from tests.tiny import ROOT, Project

IMPORTED = """
import sys, torch
before = set(sys.modules)
import paramkit
print(" ".join(sorted(set(sys.modules) - before)))
print(paramkit.backend.loader._decision, "paramkit._C" in sys.modules)
"""


def test_importing_is_cheap_and_builds_nothing(tmp_path: Path) -> None:
    project = Project(tmp_path)
    modules, rest = project.python(IMPORTED).splitlines()
    assert rest == "None False"
    heavy = {"torch.utils.cpp_extension", "setuptools", "safetensors", "rich", "transformers"}
    assert not heavy & set(modules.split())
    # Anything but our own files and small change of the standard library would show here.
    others = [name for name in modules.split() if name.split(".")[0] != "paramkit"]
    assert len(others) <= 12, others
    assert not project.cache.exists()
    assert not list(project.package.glob("_C*"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_loader: None) -> Path:
    """A loader that sees an empty package folder and an empty cache; opening a binary is fatal."""

    def never(binary: Path) -> None:
        raise AssertionError(f"{binary} was opened")

    package = tmp_path / "project" / "paramkit"
    package.mkdir(parents=True)
    (package.parent / "csrc").mkdir()
    (package.parent / "csrc" / "some.cpp").write_text("// nothing")
    monkeypatch.setattr(sources, "PACKAGE_DIR", package)
    monkeypatch.setattr(loader, "_load", never)
    monkeypatch.delitem(sys.modules, "paramkit._C", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PARAMKIT_BACKEND", raising=False)
    monkeypatch.delenv("PARAMKIT_CPU_CAPABILITY", raising=False)
    return package


def _put_binary(folder: Path, **record: str) -> None:
    (folder / sources.BINARY_NAME).write_bytes(b"binary")
    default = {"result": "built", "torch": str(torch.__version__), "python": sources.PYTHON_TAG}
    (folder / sources.RECORD_NAME).write_text(json.dumps({**default, **record}))


class Fake(SimpleNamespace):
    """An extension as the loader sees it, on a machine without AVX-512."""

    def __init__(self) -> None:
        super().__init__(current="avx2", __file__="fake.so")

    def capability(self) -> str:
        return self.current

    def capabilities(self) -> list[str]:
        return ["scalar", "avx2"]

    def set_capability(self, name: str) -> None:
        if name not in self.capabilities():
            raise ValueError(f"{name} is not available")
        self.current = name


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> Fake:
    extension = Fake()
    _put_binary(elsewhere)
    monkeypatch.setattr(loader, "_load", lambda binary: extension)
    return extension


def test_without_a_binary_one_warning_gives_reason_and_remedy(elsewhere: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"has not been built.*`paramkit build`") as caught:
        assert loader.active() is native
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.active() is native


def test_status_gives_no_warning_and_uses_up_none(elsewhere: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paramkit.status().backend == "native"
    with pytest.warns(RuntimeWarning):
        loader.active()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"torch": "2.9.0"}, "built for torch 2.9.0, and this is"),
        ({"python": ".cpython-39-x86_64-linux-gnu.so"}, "built for .cpython-39"),
        (None, "nothing tells which torch"),
    ],
)
def test_a_binary_that_does_not_match_is_never_opened(
    elsewhere: Path, record: dict[str, str] | None, reason: str
) -> None:
    _put_binary(elsewhere, **(record or {}))
    if record is None:
        (elsewhere / sources.RECORD_NAME).unlink()
    with pytest.warns(RuntimeWarning, match=reason):
        assert loader.active() is native
    assert reason in paramkit.status().why


def test_a_binary_that_fails_half_way_ends_the_search(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(binary: Path) -> None:
        raise RuntimeError("operators registered twice")

    _put_binary(elsewhere)
    monkeypatch.setattr(loader, "_load", broken)
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        assert loader.active() is native
    assert paramkit.status().error == "RuntimeError: operators registered twice"


def test_the_reason_of_a_failed_install_is_kept(elsewhere: Path) -> None:
    (elsewhere / sources.ERROR_NAME).write_text("error: no compiler\n\nand all the rest\n")
    with pytest.warns(RuntimeWarning, match=r"failed .*\(error: no compiler\)"):
        loader.active()
    status = paramkit.status()
    assert status.error is not None and "and all the rest" in status.error
    assert status.build_log == str(elsewhere / sources.ERROR_NAME)
    assert "and all the rest" in str(status)


def test_cpu_without_a_binary_is_an_error(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMKIT_BACKEND", "cpu")
    for _ in range(2):  # the second use as well
        with pytest.raises(BackendError, match=r"has not been built.*`paramkit build`"):
            loader.active()
    status = paramkit.status()
    assert status.backend == "none" and status.env["PARAMKIT_BACKEND"] == "cpu"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PARAMKIT_BACKEND", "fast", "got 'fast', expected one of auto, native, cpu, cuda"),
        ("PARAMKIT_BACKEND", "cuda", "Choices here: auto, native, cpu"),
        ("PARAMKIT_CPU_CAPABILITY", "sse9", "got 'sse9', expected one of scalar, avx2, avx512"),
        ("PARAMKIT_CPU_CAPABILITY", "avx512", "offers scalar, avx2"),
    ],
)
def test_a_setting_that_cannot_be_met_is_an_error_with_the_choices(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=message):
        loader.active()
    with pytest.raises(BackendError, match=name):
        paramkit.copy_(torch.zeros(1), torch.ones(1))
    assert paramkit.status().backend == "none"
    monkeypatch.delenv(name)
    assert loader.active() is fake


def test_a_capability_without_the_extension_is_an_error(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMKIT_CPU_CAPABILITY", "avx2")
    with pytest.raises(BackendError, match="asks for the compiled extension"):
        loader.active()
    monkeypatch.setenv("PARAMKIT_BACKEND", "native")  # native was asked for: no contradiction
    assert loader.active() is native


def test_settings_that_can_be_met(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMKIT_CPU_CAPABILITY", "scalar")
    assert loader.active() is fake and fake.current == "scalar"
    loader.reset()
    monkeypatch.setenv("PARAMKIT_BACKEND", "native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.active() is native
    assert "PARAMKIT_BACKEND=native" in paramkit.status().why


def test_force_restores_route_and_capability(fake: Fake) -> None:
    assert loader.active() is fake
    with loader.force("cpu:scalar") as forced:
        assert forced is fake and loader.active() is fake and fake.current == "scalar"
        with loader.force("native"):
            assert loader.active() is native and paramkit.status().backend == "native"
        assert loader.active() is fake and fake.current == "scalar"
    assert fake.current == "avx2"
    with pytest.raises(ZeroDivisionError), loader.force("native"):
        raise ZeroDivisionError
    assert loader.active() is fake


@pytest.mark.parametrize(
    "name", ["", "gpu", "native:avx2", "cpu:", "cpu:sse9", "cpu:avx512", "cuda"]
)
def test_force_refuses_what_there_is_not(fake: Fake, name: str) -> None:
    loader.active()
    with pytest.raises(BackendError), loader.force(name):
        pass
    assert loader.active() is fake and fake.current == "avx2"


def test_the_real_extension_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    need_extension()
    with loader.force("cpu") as extension:
        assert extension.__name__ == "paramkit._C"
        assert extension.capability() in extension.capabilities()
        assert "scalar" in extension.capabilities()
        assert str(torch.__version__).startswith(extension.torch_version())
        status = paramkit.status()
    assert status.backend == "cpu" and Path(status.binary or "").is_file()
    # One OpenMP runtime: a second one would have a pool of threads of its own.
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = maps.read_text().splitlines()
        assert len({line.split()[-1] for line in lines if "gomp" in line or "libomp" in line}) <= 1


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == paramkit.status().as_dict()
    assert cli.main(["status"]) == 0
    assert told["backend"] in capsys.readouterr().out
    for wrong in ([], ["frobnicate"], ["status", "--no-such"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(wrong)
        assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("paramkit ")


def test_the_command_line_tells_a_setting_that_cannot_be_met() -> None:
    command = [sys.executable, "-m", "paramkit", "status"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=Project.clean_environ(PARAMKIT_BACKEND="fast"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "got 'fast', expected one of" in done.stdout


def test_the_demo_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "paramkit.demo", None)
    monkeypatch.delattr(paramkit, "demo", raising=False)
    with pytest.raises(ModuleNotFoundError):  # our own module: a bug, to be seen
        cli.main(["demo"])

    class Missing:
        def __getattr__(self, name: str) -> None:
            raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setitem(sys.modules, "paramkit.demo", Missing())  # type: ignore[arg-type]
    monkeypatch.setattr(paramkit, "demo", Missing(), raising=False)
    assert cli.main(["demo"]) == 1
    assert "make demo" in capsys.readouterr().err
