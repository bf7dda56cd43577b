"""LeakSanitizer's look at a living process: after a file's tests, before Python takes itself apart.

A pytest plugin: ``-p tests.sanitize.leaks``. What torch, numpy and Python leave behind is reported too, so
that only stacks with a frame of the extension count (:func:`ours`).
"""

from __future__ import annotations

import ctypes
import gc
import re

import pytest


def check() -> int:
    """Search now; not 0 if anything leaked. The report goes to the sanitizer's log."""
    gc.collect()
    search = ctypes.CDLL(None).__lsan_do_recoverable_leak_check
    search.restype = ctypes.c_int
    return int(search())


def ours(report: str) -> list[str]:
    """The leaks in a report whose stack has a frame in the extension, or in a canary."""
    leaks = re.findall(r"^(?:Direct|Indirect) leak of .*(?:\n +#.*)+", report, re.MULTILINE)
    return [leak for leak in leaks if re.search(r"\bcanary|/_C\.", leak)]


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    check()
