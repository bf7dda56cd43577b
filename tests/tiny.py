"""A copy of the project with an extension that compiles in a second, for tests of the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The functions that the loader calls, and no others.
SOURCE = r"""
#include <Python.h>
#include <cstring>
#include <initializer_list>
namespace {
const char* current = "avx2";
PyObject* capability(PyObject*, PyObject*) { return PyUnicode_FromString(current); }
PyObject* capabilities(PyObject*, PyObject*) { return Py_BuildValue("[ss]", "scalar", "avx2"); }
PyObject* set_capability(PyObject*, PyObject* name) {
  for (const char* known : {"scalar", "avx2"})
    if (!std::strcmp(PyUnicode_AsUTF8(name), known)) {
      current = known;
      Py_RETURN_NONE;
    }
  PyErr_SetString(PyExc_ValueError, "expected scalar or avx2");
  return nullptr;
}
PyMethodDef methods[] = {{"capability", capability, METH_NOARGS, nullptr},
                         {"capabilities", capabilities, METH_NOARGS, nullptr},
                         {"set_capability", set_capability, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods,
                          nullptr, nullptr, nullptr, nullptr};
}  // namespace
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
BROKEN = SOURCE + "\nthis is not C++;\n"


class Project:
    """The project in a folder of its own, with its own extension cache."""

    def __init__(self, folder: Path, source: str = SOURCE) -> None:
        self.root = folder / "project"
        self.package = self.root / "paramkit"
        self.cache = folder / "cache"
        ignore = shutil.ignore_patterns(
            "__pycache__", "_C.*", "_cuda.so", "_build_error.txt", "csrc"
        )
        shutil.copytree(ROOT / "paramkit", self.package, ignore=ignore)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
            shutil.copy2(ROOT / name, self.root / name)
        (self.root / "README.md").write_text("A copy.\n")
        self.source = self.root / "csrc" / "core" / "tiny.cpp"
        self.source.parent.mkdir(parents=True)
        self.source.write_text(source)

    def copy(self, folder: Path) -> Project:
        """The same, with what was built so far, in another folder."""
        twin = Project.__new__(Project)
        twin.root, twin.cache = folder / "project", folder / "cache"
        twin.package = twin.root / "paramkit"
        twin.source = twin.root / self.source.relative_to(self.root)
        shutil.copytree(self.root, twin.root, ignore=shutil.ignore_patterns("build"))
        if self.cache.exists():
            twin.adopt_cache(self)
        return twin

    def adopt_cache(self, other: Project) -> None:
        """Have in the cache what another copy of the same sources built."""
        shutil.copytree(other.cache, self.cache)

    @staticmethod
    def clean_environ(**settings: str) -> dict[str, str]:
        """This process's environment without the settings that bear on paramkit or a build."""
        dropped = ("CXX", "DEBUG", "MAX_JOBS", "CFLAGS", "TORCH_EXTENSIONS_DIR")
        dropped += ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PARAMKIT_", "NVCC_"))}
        return {**{k: v for k, v in kept.items() if k not in dropped}, **settings}

    def environ(self, **settings: str) -> dict[str, str]:
        """The environment of a process that sees this copy and its cache."""
        ours = {"PYTHONPATH": str(self.root), "TORCH_EXTENSIONS_DIR": str(self.cache)}
        return self.clean_environ(**{**ours, **settings})

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """Start Python with these arguments; stdout and stderr come as one text."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.environ(**settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **settings: str) -> tuple[int, str]:
        """Run Python with these arguments to its end: exit code and output."""
        process = self.start(*arguments, **settings)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def python(self, code: str, **settings: str) -> str:
        """Run a piece of code that must succeed; its output."""
        status, output = self.run("-W", "always::RuntimeWarning", "-c", code, **settings)
        assert status == 0, output
        return output

    def install(self, **settings: str) -> tuple[int, str]:
        """What `pip install -e .` does to the package folder, without pip."""
        return self.run("setup.py", "-q", "build_ext", "--inplace", **settings)

    def build(self, *options: str, **settings: str) -> tuple[int, str]:
        """`paramkit build`."""
        return self.run("-m", "paramkit", "build", *options, **settings)

    def binaries(self) -> list[Path]:
        """The binaries in the extension cache."""
        return sorted(self.cache.glob("paramkit/*/_C*.so"))
