"""A pytest plugin: which checks refused something in which test, and the first test that fails."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# One instruction set is enough to see a check; the others double the time.
_LEFT_OUT = ("cpu:scalar", "cpu:avx2", "cuda:kernels", "cuda:to device", "cuda:to host")


# What a test of something that is refused has in its text.
_HEAVY = {"test_long_lists_are_all_looked_at"}
_REFUSES = re.compile(r"raises|outcome\(|Error|findings|refus|compare\(|run\(")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def backend(item: pytest.Item) -> Any:
        return getattr(item, "callspec", None) and item.callspec.params.get("backend")

    def refuses(item: pytest.Item) -> bool:
        function = getattr(item, "function", None)
        if function is not None and function.__name__ in _HEAVY:
            return False
        recording = "PARAMKIT_CHECK_LOG" in os.environ
        return (
            function is None
            or not recording
            or _REFUSES.search(inspect.getsource(function)) is not None
        )

    items[:] = [item for item in items if backend(item) not in _LEFT_OUT and refuses(item)]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    hits = Path(os.environ["PARAMKIT_CHECK_HITS"]) if "PARAMKIT_CHECK_HITS" in os.environ else None
    if hits is not None:
        hits.write_text("", encoding="utf-8")
    yield
    if hits is not None:
        # A test that fails with every check in place says nothing about any.
        found = set(hits.read_text(encoding="utf-8").split()) if item.nodeid not in _failed else ()
        with Path(os.environ["PARAMKIT_CHECK_LOG"]).open("a", encoding="utf-8") as log:
            log.write(
                json.dumps([item.nodeid, _seconds.pop(item.nodeid, 0.0), sorted(found)]) + "\n"
            )


_seconds: dict[str, float] = {}
_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration
    failed = os.environ.get("PARAMKIT_CHECK_FAILED")
    if report.failed:
        _failed.add(report.nodeid)
    if report.failed and failed:
        with Path(failed).open("a", encoding="utf-8") as file:
            file.write(report.nodeid + "\n")
