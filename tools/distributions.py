"""Build the source distribution, and from it the wheel, so that what is missing in the one shows.

    python tools/distributions.py dist

Each is built in a process of its own, with the setuptools and the torch of this Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_HOOK = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)


class Failed(RuntimeError):
    """A distribution could not be built; the text is what the build printed, if that was kept."""


def sdist(root: Path, out: Path, quiet: bool = False) -> Path:
    """Build the source distribution of a project; its path."""
    return _built("build_sdist", root, out, "*.tar.gz", None, quiet)


def wheel(
    archive: Path, out: Path, environ: dict[str, str] | None = None, quiet: bool = False
) -> Path:
    """Build the wheel of a source distribution, unpacked for that; its path."""
    with tempfile.TemporaryDirectory(prefix="paramkit-wheel-") as folder:
        with tarfile.open(archive) as file:
            # The argument came to Python 3.10 and 3.11 with later releases of them.
            file.extractall(
                folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
            )
        (root,) = Path(folder).iterdir()
        return _built("build_wheel", root, out, "*.whl", environ, quiet)


def describe(path: Path) -> str:
    """What a wheel has and where it can be used."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        binary = any(Path(name).match("paramkit/_C*.so") for name in names)
        record: dict[str, Any] = (
            json.loads(archive.read("paramkit/_C.json")) if "paramkit/_C.json" in names else {}
        )
        failed = "paramkit/_build_error.txt"
        reason = archive.read(failed).decode().partition("\n")[0] if failed in names else ""
    size = f"{path.name}: {path.stat().st_size / 1e6:.1f} MB"
    if binary:
        cuda = "with" if "paramkit/_cuda.so" in names else "without"
        return (
            f"{size}, with a binary for torch {record['torch']} and Python {record['python']}, "
            f"{cuda} the CUDA library. With another torch it runs on torch's own copy_ and fill_"
        )
    why = reason or ("PARAMKIT_BUILD=off" if record.get("result") == "off" else "no record")
    return f"{size}, without a binary ({why}): it runs on torch's own copy_ and fill_"


def _built(
    hook: str, root: Path, out: Path, pattern: str, environ: dict[str, str] | None, quiet: bool
) -> Path:
    """Call a hook of the build backend in a project; the file that it made."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", _HOOK, hook, folder],
            cwd=root,
            env=dict(os.environ) if environ is None else environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Failed(done.stdout or f"{hook} ended with status {done.returncode}")
        (made,) = Path(folder).glob(pattern)
        return made.replace(out / made.name)


def main(out: str) -> None:
    try:
        archive = sdist(ROOT, Path(out))
        print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB")
        print(describe(wheel(archive, Path(out))))
    except Failed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["dist"])
