"""What `make checks` rests on: every kind of check is found, and gone when it is taken out."""

from __future__ import annotations

import json
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tools import remove_checks
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
        '  if (a) raise_plan_error("text");\n'
        "  torch::autograd::check_inplace(a, true);\n}\n",
    )
    assert [site.function for site in sites] == ["f"] * 5
    assert 'TORCH_CHECK((g(a, "x,)") && b > 0) || !keep_check("a.cpp:0"), "text");' in text
    assert 'TORCH_CHECK_TYPE(!keep_check("a.cpp:1"), "text");' in text
    assert 'if (a) if (keep_check("a.cpp:2")) throw py::value_error("text");' in text
    assert 'catch (...) { if (keep_check("a.cpp:4")) throw; }' in text
    assert 'if (a) if (keep_check("a.cpp:3")) raise_plan_error("text");' in text
    assert "if (b) throw python_error();" in text


def test_a_function_that_only_throws_returns_something() -> None:
    body = '{\n  throw py::value_error("a); " + text(1, 2));\n}\n'
    text, _ = cpp_sites.rewrite("a.cpp", f"Kind f(int a) {body}void g() {body}")
    assert text.count("return {};") == 1
    assert text.count("text(1, 2)); return {};\n}\nvoid g()") == 1


def test_functions_of_cpp() -> None:
    heads = ("void f(int a)", "A::A(B b) : b_(b)", "[[noreturn]] void g()", "at::Tensor* h()")
    for head, name in zip(heads, ("f", "A::A", "g", "h"), strict=True):
        _, (site,) = cpp_sites.rewrite("a.cpp", f"{head} {{\n  TORCH_CHECK(b, 1);\n}}\n")
        assert site.function == name
    declared = "void raise_plan_error(const char* text) {\n  throw py::error_already_set();\n}\n"
    assert cpp_sites.rewrite("a.cpp", declared)[1] == []


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


def test_the_table_has_every_check() -> None:
    """A new one needs a test that fails without it, or a reason: `make checks` writes the table."""
    there = Counter((site.file, site.function, site.check) for site in tree.sites_of())
    noted = Counter((row["file"], row["function"], row["check"]) for row in TABLE)
    assert sorted((there - noted).elements()) == [], "not in tests/removed_checks.json"
    assert sorted((noted - there).elements()) == [], "no longer there"


def test_no_file_with_checks_is_left_out() -> None:
    """Whatever refuses something is tried, or named with what it is about."""
    listed = {*tree.PYTHON, *tree.CPP}
    python = {str(p.relative_to(ROOT / "paramkit")) for p in (ROOT / "paramkit").rglob("*.py")}
    cpp = {p.name for p in (ROOT / "csrc" / "torch").glob("*.cpp")}
    checked = {site.file for site in tree.sites_of(python, cpp)}
    refusing = {file.removeprefix("paramkit/").removeprefix("csrc/torch/") for file in checked}
    tops = {name: {name, name.split("/")[0]} & tree.ELSEWHERE.keys() for name in refusing}
    assert {name for name, top in tops.items() if not top} == listed
    assert set().union(*tops.values()) == tree.ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("body", "found"), [("pass", False), ("assert 0", True), ("while 1: pass", False)]
)
def test_what_counts_as_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, found: bool
) -> None:
    """A failure does; a test that has to be stopped says nothing of the check."""
    if "while" in body:
        monkeypatch.setattr(remove_checks, "SECONDS", 3)
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    site = python_sites.Site("a.py:0", "a.py", "f", "raise ValueError()")
    test = "test_it.py::test_it"
    assert remove_checks.noticed(tmp_path, site, [test]) == (test if found else None)
