"""The source distribution and the wheel: what is in them, and what they do where there is no compiler."""

from __future__ import annotations

import base64
import csv
import email.message
import email.parser
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import paramkit
from paramkit.backend import sources
from tests.tiny import ROOT, Project
from tools import distributions

USED = "import paramkit; print(paramkit.backend.active().__name__)"
NO_COMPILER = {"CXX": "/nonexistent", "CC": "/nonexistent"}
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


class Made:
    """A wheel, unpacked as pip would, beside the torch of this Python."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.wheel = wheel
        self.site = folder
        with zipfile.ZipFile(wheel) as archive:
            self.names = archive.namelist()
            archive.extractall(folder)

    def text(self, name: str) -> str:
        """A file of the wheel's metadata."""
        (path,) = self.site.glob(f"paramkit-*.dist-info/{name}")
        return path.read_text()

    def metadata(self) -> email.message.Message:
        return email.parser.Parser().parsestr(self.text("METADATA"))

    def python(self, code: str, **settings: str) -> str:
        """Run a piece of code where there is no program at all, neither a compiler nor another."""
        environ = Project.clean_environ(
            **{
                "PYTHONPATH": str(self.site),
                "PATH": "/nonexistent",
                "TORCH_EXTENSIONS_DIR": str(self.site.parent / "cache"),
                **NO_COMPILER,
                **settings,
            }
        )
        done = subprocess.run(
            [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
            cwd="/",
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with a tiny extension, and what a developer may have lying about."""
    project = Project(tmp_path_factory.mktemp("project"))
    (project.root / "README.md").write_text((ROOT / "README.md").read_text())
    for name in ("_C.json", "_build_error.txt", sources.BINARY_NAME, sources.CUDA_NAME):
        (project.package / name).write_text("of the checkout")
    (project.package / f"{sources.BINARY_NAME}.tmp").write_text("half of a library")
    (project.root / "csrc" / "core" / "tiny.o").write_text("an object file")
    return project


@pytest.fixture(scope="module")
def archive(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distributions.sdist(project.root, tmp_path_factory.mktemp("sdist"), quiet=True)


def _wheel(archive: Path, folder: Path, **settings: str) -> Made:
    environ = Project.clean_environ(**settings)
    return Made(distributions.wheel(archive, folder, environ, quiet=True), folder / "site")


@pytest.fixture(scope="module")
def with_binary(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _wheel(archive, tmp_path_factory.mktemp("binary"), PARAMKIT_BUILD="require")


@pytest.fixture(scope="module")
def without_compiler(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Made where there is no compiler, by the default settings."""
    return _wheel(archive, tmp_path_factory.mktemp("without"), **NO_COMPILER)


def _package_files() -> set[str]:
    """All files that belong to the package, without what builds and runs leave."""
    left = ("_C.", "_cuda.so", "_build_error.txt")
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "paramkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(left)
    }


# --- the source distribution --------------------------------------------------------------------


def test_the_source_distribution_has_all_that_a_build_needs(archive: Path) -> None:
    assert archive.name == f"paramkit-{paramkit.__version__}.tar.gz"
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
        assert all(not name.startswith(("/", "..")) for name in names)
    assert _package_files() <= names
    needed = {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "PKG-INFO"}
    assert needed | {"csrc/core/tiny.cpp"} <= names
    strange = r"\.(so|o|pyc|tmp)$|__pycache__|_C\.json|_build_error|^(build|dist|tests|\.)"
    assert [name for name in names if re.search(strange, name)] == []


def test_the_manifest_drops_no_source_of_the_extension() -> None:
    """Every kind of file in csrc is one that counts for the hash of a build, and none is left out."""
    manifest = (ROOT / "MANIFEST.in").read_text()
    assert "graft csrc" in manifest
    kinds = {path.suffix for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    dropped = set(re.findall(r"\*(\.\w+)", manifest.partition("global-exclude")[2]))
    assert kinds <= set(sources._SOURCE_SUFFIXES) and not kinds & dropped


# --- the wheel ----------------------------------------------------------------------------------


def test_the_wheel_has_the_package_the_sources_and_the_binary(with_binary: Made) -> None:
    names = set(with_binary.names)
    assert _package_files() <= names
    assert "paramkit/csrc/core/tiny.cpp" in names and "paramkit/py.typed" in names
    assert f"paramkit/{sources.BINARY_NAME}" in names and "paramkit/_C.json" in names
    strange = r"\.(o|pyc|tmp)$|__pycache__|_build_error|_cuda\.so|^(build|tests|csrc)/"
    assert [name for name in names if re.search(strange, name)] == []
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"paramkit"}


def test_the_record_names_no_folder_of_the_builder(with_binary: Made) -> None:
    record = json.loads((with_binary.site / "paramkit" / "_C.json").read_text())
    assert record["torch"] == torch.__version__ and record["python"] == sources.PYTHON_TAG
    assert "log" not in record
    assert "/tmp" not in json.dumps(record) and str(ROOT) not in json.dumps(record)


def test_the_metadata(with_binary: Made) -> None:
    told = with_binary.metadata()
    assert (told["Name"], told["Version"]) == ("paramkit", paramkit.__version__)
    assert told["Requires-Python"] == ">=3.10"
    assert told["License-Expression"] == "BSD-3-Clause"
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    needed = [one for one in told.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert sorted(needed) == ["numpy", "safetensors", "torch>=2.9"]
    assert "paramkit = paramkit.cli:main" in with_binary.text("entry_points.txt")
    assert told.get_payload()[:10] == (ROOT / "README.md").read_text()[:10]
    assert with_binary.text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_the_tags(with_binary: Made, without_compiler: Made) -> None:
    """A wheel that may have a binary is for one Python and one platform, whether it has got one or not."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    for made in (with_binary, without_compiler):
        tag = f"{TAG}-{TAG}-{platform}"
        assert made.wheel.name == f"paramkit-{paramkit.__version__}-{tag}.whl"
        assert f"Tag: {tag}" in made.text("WHEEL")
        assert "Root-Is-Purelib: false" in made.text("WHEEL")


def test_every_file_is_in_the_wheels_own_record(with_binary: Made) -> None:
    rows = list(csv.reader(io.StringIO(with_binary.text("RECORD"))))
    assert {row[0] for row in rows} == set(with_binary.names)
    for name, digest, size in rows:
        if digest:
            content = (with_binary.site / name).read_bytes()
            found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            assert digest == f"sha256={found.decode()}" and int(size) == len(content)


def test_off_makes_a_wheel_for_every_python(archive: Path, tmp_path: Path) -> None:
    made = _wheel(archive, tmp_path, PARAMKIT_BUILD="off")
    assert made.wheel.name == f"paramkit-{paramkit.__version__}-py3-none-any.whl"
    assert json.loads((made.site / "paramkit" / "_C.json").read_text())["result"] == "off"
    assert not [name for name in made.names if name.endswith(".so")]
    assert _package_files() <= set(made.names)
    assert "PARAMKIT_BUILD=off" in distributions.describe(made.wheel)


# --- used where there is no compiler ------------------------------------------------------------


def test_a_matching_binary_is_used(with_binary: Made) -> None:
    code = (
        f"{USED}; print(paramkit.status().binary)\n"
        "import torch\nfrom paramkit.backend import sources\n"
        "print(sources.source_hash(sources.csrc_dir(), torch.__version__))"
    )
    package = with_binary.site / "paramkit"
    # The sources in it are those of the binary: `paramkit build` there makes the same.
    record = json.loads((package / "_C.json").read_text())
    expected = ["paramkit._C", str(package / sources.BINARY_NAME), record["source_hash"]]
    assert with_binary.python(code).splitlines() == expected
    assert f"with a binary for torch {torch.__version__}" in distributions.describe(
        with_binary.wheel
    )


def test_a_binary_for_another_torch_falls_back_and_says_so(
    with_binary: Made, tmp_path: Path
) -> None:
    made = Made(with_binary.wheel, tmp_path / "site")
    path = made.site / "paramkit" / "_C.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "2.9.0"}))
    output = made.python(
        f"{USED}\nimport torch\nt = torch.zeros(3)\nparamkit.copy_(t, torch.ones(3))\n"
        "print(t.tolist())\nprint('mapped', 'paramkit/_C' in open('/proc/self/maps').read())\n"
        "print(paramkit.status())"
    )
    assert output.count("RuntimeWarning") == 1
    told = f"the extension was built for torch 2.9.0, and this is {torch.__version__}"
    assert output.count(told) == 2  # the warning and the status
    assert "[1.0, 1.0, 1.0]" in output and "mapped False" in output


def test_without_a_binary_it_falls_back_and_says_so(without_compiler: Made) -> None:
    assert not [name for name in without_compiler.names if name.endswith(".so")]
    output = without_compiler.python(f"{USED}; print(paramkit.status())")
    assert output.count("RuntimeWarning") == 1 and "paramkit.backend.native" in output
    assert output.count("building it failed when paramkit was installed") == 2
    assert "no working C++ compiler: /nonexistent" in output
    # Asked for, it fails and says what is missing; what is there goes on.
    code = (
        "import paramkit\ntry:\n    paramkit.backend.build(verbose=False)\n"
        "except paramkit.backend.BuildError as error:\n    print(error)\n"
        "print(paramkit.backend.active().__name__)"
    )
    output = without_compiler.python(code, PARAMKIT_BACKEND="native")
    assert "no working C++ compiler: /nonexistent" in output
    assert output.splitlines()[-1] == "paramkit.backend.native"
    assert "without a binary" in distributions.describe(without_compiler.wheel)


# --- elsewhere ----------------------------------------------------------------------------------


class Elsewhere:
    """A new virtual environment that has torch, what torch needs, and nothing else but pip."""

    def __init__(self, folder: Path, *more: str) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(self.run("-c", where).strip())
        # Python before 3.12 puts a setuptools beside pip that is too old.
        for old in ("setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth"):
            path = site / old
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in site.glob("setuptools-*.dist-info"):
            shutil.rmtree(path)
        for name in _needs("torch", "numpy", "safetensors", *more):
            _link(name, site)
        self.site = site

    def run(self, *arguments: str, **settings: str) -> str:
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd="/",
            env=Project.clean_environ(PYTHONPATH="", **settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def pip(self, *arguments: str, **settings: str) -> str:
        """pip, without the network."""
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments, **settings)


def _needs(*names: str) -> set[str]:
    """Distributions and all that they require in this environment."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if name not in found:
            found.add(name)
            left += [re.split(r"[ ;<>=!~\[(]", one)[0] for one in required if "extra ==" not in one]
    return found


def _link(name: str, site: Path) -> None:
    """Have a distribution of this environment in another one, by links to its folders and files."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        top = file.parts[0]
        if top in ("..", "__pycache__") or (site / top).exists():
            continue
        source = Path(str(distribution.locate_file(top)))
        if source.exists():
            (site / top).symlink_to(source)


@pytest.mark.slow
def test_a_source_distribution_builds_elsewhere(tmp_path: Path) -> None:
    """The true one, in an environment with torch and the tools; its wheel in one that has torch alone."""
    archive = distributions.sdist(_true_project(tmp_path), tmp_path / "dist", quiet=True)
    there = Elsewhere(tmp_path / "builder", "setuptools", "ninja", "wheel")
    options = ("--no-build-isolation", "--no-index", "--no-deps", "-w", str(tmp_path / "dist"))
    settings = {"PARAMKIT_BUILD": "require", "PARAMKIT_CUDA": "off"}
    there.pip("wheel", *options, str(archive), **settings)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert f"with a binary for torch {torch.__version__}" in distributions.describe(wheel)
    clean = Elsewhere(tmp_path / "clean")
    nothing = {"PATH": "/nonexistent", **NO_COMPILER}
    clean.pip("install", "--no-index", str(wheel), **nothing)  # all that it requires is there
    check = (
        "import paramkit, torch\n"
        "a = torch.zeros(5, 7); b = torch.arange(35.0).view(7, 5).t()\n"
        "with paramkit.backend.trace() as t:\n    paramkit.copy_(a, b)\n"
        "assert torch.equal(a, b) and 'native' not in t.routes, t\n"
        "print(paramkit.__file__, paramkit.status().binary, paramkit.status().backend)"
    )
    file, binary, backend = clean.run("-W", "error", "-c", check, **nothing).split()
    assert Path(file).is_relative_to(clean.site) and Path(binary).is_relative_to(clean.site)
    assert backend == "cpu"


def _true_project(folder: Path) -> Path:
    """The project as it is, without what builds have left in it."""
    root = folder / "true"
    root.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "_C.*", "_cuda.so", "_build_error.txt")
    for name in ("paramkit", "csrc"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy2(ROOT / name, root / name)
    return root


@pytest.mark.slow
def test_the_true_source_distribution_has_the_same_sources(tmp_path: Path) -> None:
    archive = distributions.sdist(_true_project(tmp_path), tmp_path / "dist", quiet=True)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    assert sources.source_hash(root / "csrc", "x") == sources.source_hash(ROOT / "csrc", "x")
