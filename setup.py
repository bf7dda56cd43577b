"""Builds the extension `paramkit._C` and the CUDA library; the rest of the package is in pyproject.toml.

PARAMKIT_BUILD says what a failed build means: `auto` (default) installs without the extension and
keeps the reason, `require` fails, `off` does not build. PARAMKIT_CUDA says the same of the CUDA
library, which is built beside the extension where there is an nvcc. MAX_JOBS, DEBUG=1, CXX, CFLAGS
and TORCH_CUDA_ARCH_LIST are honoured.
"""

from __future__ import annotations

import shutil
import sys
import traceback
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# The files that know how to build, without running paramkit/__init__.py: it needs torch.
_package = types.ModuleType("_paramkit_build")
_package.__path__ = [str(ROOT / "paramkit" / "backend")]
sys.modules[_package.__name__] = _package
from _paramkit_build import compile as compiling  # noqa: E402
from _paramkit_build import compile_cuda, lock, sources  # noqa: E402

try:
    MODE = sources.build_mode()
    CUDA_MODE = sources.cuda_mode()
except ValueError as error:
    sys.exit(f"error: {error}")
if (MODE, CUDA_MODE) == ("off", "require"):
    sys.exit("error: PARAMKIT_CUDA=require, but nothing is built with PARAMKIT_BUILD=off")

# What building may leave in the package.
RESULTS = (sources.BINARY_NAME, sources.CUDA_NAME, sources.RECORD_NAME, sources.ERROR_NAME)


class BuildExtension(build_ext):
    """Compile, then put what was built and the record, or the reason for its absence, in place."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = ROOT / "paramkit" if in_place else Path(self.build_lib).resolve() / "paramkit"
        package.mkdir(parents=True, exist_ok=True)
        # What an earlier build left must not pass for the result of this one.
        for name in RESULTS:
            (package / name).unlink(missing_ok=True)
        if MODE == "off":
            record = {"result": "off", "time": sources.now()}
            sources.write_record(package / sources.RECORD_NAME, record)
            return
        try:
            # Two installations from one checkout would compile in the same folder.
            with lock.locked(ROOT / "build", lambda line: print(f"paramkit: {line}")):
                self._compile(package, keep_log=bool(in_place))
        except Exception as error:
            text = getattr(error, "output", "") or traceback.format_exc()
            (package / sources.ERROR_NAME).write_text(f"{error}\n\n{text}", encoding="utf-8")
            if "require" in (MODE, CUDA_MODE):
                sys.stderr.write(text)
                setting = "PARAMKIT_BUILD" if MODE == "require" else "PARAMKIT_CUDA"
                what = getattr(error, "what", "the extension")
                sys.exit(f"error: {setting}=require, and {what} did not build: {error}")
            sys.stderr.write(
                f"warning: paramkit is installed without its extension: {error}\n"
                f"warning: the whole output is in {package / sources.ERROR_NAME}\n"
            )

    def _compile(self, package: Path, keep_log: bool) -> None:
        # Kept between builds, so that only changed files are compiled again. One folder for each
        # torch: ninja does not look for changes in system headers, and torch's are system headers.
        build = ROOT / "build" / f"ext{sources.PYTHON_TAG}-torch{_torch_version()}"
        out = build / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        log = build / "build.log"
        compile_cuda.check_settings(sources.csrc_dir())
        binary = compiling.compile_extension(out, build / "objects", log, print)
        # One folder for every torch and Python: the library knows neither.
        cuda = compile_cuda.compile_library(out, ROOT / "build" / "cuda", log, print)
        if cuda["result"] == "failed":
            sys.stderr.write(
                f"warning: paramkit is installed without its CUDA library: {cuda['reason']}\n"
            )
        record = sources.read_record(out / sources.RECORD_NAME) or {}
        if keep_log:  # a wheel goes where there is no such file
            record["log"] = str(log)
        # A running program may have the old files mapped: new files, not new content. The record
        # comes last, since a binary counts only with its record.
        built = [binary, *([out / sources.CUDA_NAME] if cuda["result"] == "built" else [])]
        for path in built:
            staged = package / f"{path.name}.tmp"
            try:
                shutil.copy2(path, staged)
                staged.replace(package / path.name)
            finally:
                staged.unlink(missing_ok=True)  # a part of a library must not get into a wheel
        sources.write_record(package / sources.RECORD_NAME, record)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "paramkit"
        return [str(package / name) for name in RESULTS if (package / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPackage(build_py):
    """Ship the C++ sources inside the wheel, so that `paramkit build` works there."""

    def run(self) -> None:
        super().run()
        if MODE == "off":
            # There is no extension, so setuptools leaves the command out; it writes the record.
            command = self.get_finalized_command("build_ext")
            command.editable_mode = self.editable_mode
            self.run_command("build_ext")
        if not self.editable_mode:
            target = Path(self.build_lib) / "paramkit" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


def _torch_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "-none"


# The command above finds the sources itself; the list here is what ties the wheel to a Python and a
# platform. One that is not to have a binary is for all of them.
setup(
    ext_modules=[] if MODE == "off" else [Extension("paramkit._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
)
