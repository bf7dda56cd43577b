"""Stands in for nvcc in tests of the build: answers as it does, and makes a file at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.tiny import Project

# What it knows: an old one, a second form of one, and not in order, as nvcc's own list is.
LISTED = ("compute_52", "compute_75", "compute_90", "compute_90a", "compute_80")
TARGETS = [
    "-gencode=arch=compute_75,code=sm_75",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]
ARCHITECTURES = ["75", "80", "90", "90+PTX"]
VERSION = "12.4.131"

_SCRIPT = """#!{python} -SE
import re, sys
from pathlib import Path

here, arguments = Path(__file__).parent, sys.argv[1:]
with (here / "calls").open("a") as calls:
    print(*arguments, file=calls)
if "--version" in arguments:
    print("nvcc: NVIDIA (R) Cuda compiler driver")
    print("Cuda compilation tools, release 12.4, V{version}")
elif "--list-gpu-arch" in arguments:
    print({listed!r})
elif (here / "broken").exists():
    print('launch.cu(7): warning #177-D: variable "a" was declared but never referenced')
    print('launch.cu(8): error: identifier "b" is undefined')
    print('1 error detected in the compilation of "launch.cu".')
    sys.exit(2)
else:
    for number, name in enumerate(re.findall(r"code=sm_(\\w+)", " ".join(arguments))):
        for kernel in ("_Z1av", "_Z1bv"):
            spilled, registers = (8, 255) if (number, kernel) == (1, "_Z1av") else (0, 40 + number)
            print(f"ptxas info    : Compiling entry function '{{kernel}}' for 'sm_{{name}}'")
            print(f"ptxas info    : Function properties for {{kernel}}")
            print(f"    16 bytes stack frame, {{spilled}} bytes spill stores, 0 bytes spill loads")
            print(f"ptxas info    : Used {{registers}} registers, used 1 barriers, 8448 bytes smem")
    Path(arguments[arguments.index("-o") + 1]).write_text(f"library {{sys.argv}}")
"""


class FakeNvcc:
    """A folder laid out as a toolkit, with an nvcc that keeps its command lines."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / "bin" / "nvcc"
        self.path.parent.mkdir(parents=True)
        script = _SCRIPT.format(python=sys.executable, version=VERSION, listed="\n".join(LISTED))
        self.path.write_text(script)
        self.path.chmod(0o755)

    def compilations(self) -> list[str]:
        """The command lines that compiled something."""
        calls = self.path.with_name("calls")
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line for line in lines if "-o" in line.split()]

    def fail(self, broken: bool = True) -> None:
        """Let every compilation fail, or none."""
        mark = self.path.with_name("broken")
        mark.touch() if broken else mark.unlink()


def path_without_nvcc(folder: Path) -> str:
    """PATH with everything that it has, but for nvcc."""
    kept = []
    for number, entry in enumerate(os.environ.get("PATH", "").split(os.pathsep)):
        if (Path(entry) / "nvcc").exists():
            shadow = folder / f"path{number}"
            shadow.mkdir(parents=True)
            for program in Path(entry).iterdir():
                if program.name != "nvcc":
                    (shadow / program.name).symlink_to(program)
            entry = str(shadow)
        kept.append(entry)
    return os.pathsep.join(kept)


def add_cuda(project: Project) -> None:
    """Give a project a CUDA source, and hide the toolkit that this machine may have in its usual place."""
    folder = project.root / "csrc" / "cuda"
    folder.mkdir()
    (folder / "launch.cu").write_text("// kernels\n")
    file = project.package / "backend" / "toolkit.py"
    usual = 'Path("/usr/local/cuda")'
    assert file.read_text().count(usual) == 1
    file.write_text(file.read_text().replace(usual, 'Path("/no/such/folder")'))
