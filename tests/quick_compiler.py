"""Stands in for the compiler in tests of what surrounds it: a build in a millisecond, in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import paramkit.backend  # binds the function `build` over the file of that name
from paramkit.backend import compile as compiling
from paramkit.backend import loader, sources

builder: Any = sys.modules["paramkit.backend.build"]


class QuickCompiler:
    """A package without a binary, an empty extension cache, and a build that makes a file of `content`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = b"binary"
        self.compiled = 0  # how often
        self.meanwhile: Callable[[], object] = lambda: None  # done while it compiles
        self.package = folder / "project" / "paramkit"
        self.package.mkdir(parents=True)
        csrc = self.package.parent / "csrc"
        csrc.mkdir()
        (csrc / "some.cpp").write_text("// nothing")
        self.root = folder / "extensions"
        monkeypatch.setattr(sources, "PACKAGE_DIR", self.package)
        monkeypatch.delitem(sys.modules, "paramkit._C", raising=False)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(self.root))
        for name in ("PARAMKIT_BACKEND", "PARAMKIT_CPU_CAPABILITY", "PARAMKIT_BUILD", "DEBUG"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PARAMKIT_CUDA", "off")
        monkeypatch.setattr(compiling, "compile_extension", self._compile)

    def _compile(self, out: Path, temp: Path, log: Path, say: Callable[[str], None]) -> Path:
        self.compiled += 1
        log.write_text("compiled\n")
        binary = out / sources.BINARY_NAME
        half = len(self.content) // 2
        binary.write_bytes(self.content[:half])
        self.meanwhile()
        with binary.open("ab") as file:
            file.write(self.content[half:])
        version = str(torch.__version__)
        csrc = sources.csrc_dir()
        assert csrc is not None
        record = {
            "result": "built",
            "torch": version,
            "python": sources.PYTHON_TAG,
            "source_hash": sources.source_hash(csrc, version),
            "sha256": sources.file_digest(binary),
            "compiler": "none",
            "flags": sources.compile_flags(),
            "time": sources.now(),
        }
        sources.write_record(out / sources.RECORD_NAME, record)
        return binary

    @property
    def cache(self) -> Path:
        return self.root / "paramkit"

    @property
    def folder(self) -> Path:
        """Where a build for this torch goes."""
        csrc = sources.csrc_dir()
        assert csrc is not None
        return self.cache / sources.source_hash(csrc, str(torch.__version__))

    @property
    def binary(self) -> Path:
        return self.folder / sources.BINARY_NAME

    @property
    def record(self) -> Path:
        return self.folder / sources.RECORD_NAME

    def build(self, **options: bool) -> Path:
        path: Path = paramkit.backend.build(verbose=False, **options)
        return path

    def problem(self) -> str:
        """Why the loader would not open what is in the cache; empty if it would."""
        _, problem = loader._in_cache(self.folder, str(torch.__version__))
        return problem

    def in_child(self, work: Callable[[], object]) -> int:
        """Run something in a fork of this process; how it ended, as a process's exit code."""
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
