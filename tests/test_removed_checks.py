"""What `make checks` rests on: every kind of check is found, and gone when it is taken out."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tools.checks import cpp_sites, python_sites, tree

ROOT = Path(__file__).resolve().parent.parent
TABLE = json.loads((ROOT / "tests" / "removed_checks.json").read_text(encoding="utf-8"))

SOURCE = '''"""A module."""
from __future__ import annotations

def raises(x):
    if x < 0:
        raise ValueError("negative")
    return x

def finds(x) -> Finding | None:
    if x < 0:
        return Finding("x", "type")
    return None

def lists(xs):
    findings = [Finding(str(x), "type") for x in xs if x < 0]
    if len(xs) > 2:
        findings.append(Finding("xs", "shape"))
    findings += [Finding(str(x), "odd") for x in xs if x % 2]
    return findings

def passes_on():
    try:
        return 1 // 0
    except ZeroDivisionError as error:
        raise
'''


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The rewritten source, run; `removed` holds the keys of the checks that are taken out."""
    removed: set[str] = set()
    kept = types.ModuleType("paramkit._kept")
    kept.keep = lambda site: site not in removed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "paramkit._kept", kept)
    text, sites = python_sites.rewrite("module.py", SOURCE)
    namespace: dict[str, Any] = {"Finding": lambda *args: args, "removed": removed}
    exec(compile(text, "module.py", "exec"), namespace)
    namespace["sites"] = sites
    return namespace


def test_every_kind_of_check_is_found(module: dict[str, Any]) -> None:
    assert [(site.function, site.check.split("(")[0]) for site in module["sites"]] == [
        ("raises", "raise ValueError"),
        ("finds", "return Finding"),
        ("lists", "findings = [Finding"),
        ("lists", "findings.append"),
        ("lists", "findings += [Finding"),
    ]


def test_checks_are_there_until_they_are_taken_out(module: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="negative"):
        module["raises"](-1)
    assert module["finds"](-1) == ("x", "type")
    assert module["lists"]([-2, 4, 2]) == [("-2", "type"), ("xs", "shape")]
    assert module["lists"]([3]) == [("3", "odd")]
    module["removed"].update(site.key for site in module["sites"])
    assert module["raises"](-1) == -1
    assert module["finds"](-1) is None
    assert module["lists"]([-1, 1, 2]) == []
    with pytest.raises(ZeroDivisionError):
        module["passes_on"]()


def test_checks_of_cpp() -> None:
    text, sites = cpp_sites.rewrite(
        "a.cpp",
        'void f(int a, int b) {\n  TORCH_CHECK(g(a, "x,)") && b > 0, "text");\n'
        '  TORCH_CHECK_TYPE(false, "text");\n  check_inplace(a);\n'
        '  if (a) throw py::value_error("text");\n  if (b) throw python_error();\n'
        "  torch::autograd::check_inplace(a, true);\n}\n",
    )
    assert [site.function for site in sites] == ["f"] * 4
    assert 'TORCH_CHECK((g(a, "x,)") && b > 0) || !keep_check("a.cpp:0"), "text");' in text
    assert 'TORCH_CHECK_TYPE(!keep_check("a.cpp:1"), "text");' in text
    assert 'if (a) if (keep_check("a.cpp:2")) throw py::value_error("text");' in text
    assert 'catch (...) { if (keep_check("a.cpp:3")) throw; }' in text
    assert "if (b) throw python_error();" in text


def test_every_file_of_the_stage_has_checks() -> None:
    for name in tree.PYTHON:
        source = (ROOT / "paramkit" / name).read_text(encoding="utf-8")
        text, sites = python_sites.rewrite(name, source)
        compile(text, name, "exec")
        assert sites, name
    for name in tree.CPP:
        source = (ROOT / "csrc" / "torch" / name).read_text(encoding="utf-8")
        assert cpp_sites.rewrite(name, source)[1], name


def test_the_table_names_tests_that_exist() -> None:
    assert TABLE
    for row in TABLE:
        assert row["test"] or row["excused"], row
        if row["test"]:
            file, name = re.fullmatch(r"(tests/\w+\.py)::(\w+).*", row["test"]).groups()  # type: ignore[union-attr]
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {name}(" in text, row["test"]
