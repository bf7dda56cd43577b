"""The documents tell the truth: every Python block runs, every shown output is what is printed.

In a file, blocks run in order in one namespace. A `text` block right after a `python` block is what
that block prints; `...` in it stands for anything. `<!-- needs: MODULE -->` right before a block leaves
it out where the module is not installed. Of `sh` blocks the project's own commands must exist. Any other
block says why nothing runs it: `<!-- not run: REASON -->` right before it.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import paramkit
import paramkit.distributed
from paramkit import cli
from paramkit.backend import loader
from tests.documents import ROOT, blocks, commands, problem, prose, unmarked

PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
# Pages without a Python block: there the commands are checked, or what they show comes from elsewhere.
WITHOUT_PYTHON = {
    f"docs/{name}.md"
    for name in (
        *("index", "install", "command-line", "environment", "benchmarks", "results", "api"),
        "trust",
    )
}
DOCUMENTS = ("README.md", *(page for page in PAGES if page not in WITHOUT_PYTHON))
ALL = ("README.md", *PAGES, "CONTRIBUTING.md", "benchmarks/results/README.md")

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)

# The extension is not a Python file, and importing __main__ is for running it.
_LEFT_OUT = ("paramkit._C", "paramkit._cuda", "paramkit.__main__")
_FOUND = (module.name for module in pkgutil.walk_packages(paramkit.__path__, "paramkit."))
MODULES = ["paramkit", *sorted(name for name in _FOUND if name not in _LEFT_OUT)]


def run(path: Path) -> None:
    """Run the blocks of a document, and compare what they print with what is shown."""
    python = [b for b in blocks(path.read_text(encoding="utf-8")) if b.language == "python"]
    assert python, f"{path.name} has no Python block"
    checker = doctest.OutputChecker()
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in python:
        if block.why_not:
            continue
        if block.needs and find_spec(block.needs) is None:
            assert not os.environ.get("CI"), f"CI must have {block.needs}"
            continue
        printed = io.StringIO()
        # Empty lines in front, so that a traceback has the line numbers of the document.
        code = compile("\n" * block.line + block.code, str(path), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is None:
            continue
        if not checker.check_output(block.output, printed.getvalue(), doctest.ELLIPSIS):
            pytest.fail(
                f"{path.name}:{block.line}: shown:\n{block.output}\nprinted:\n{printed.getvalue()}"
            )


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; a process group that was made in it is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_run(name: str, backend: str, elsewhere: Path) -> None:
    run(ROOT / name)


@pytest.mark.filterwarnings("ignore:paramkit runs on torch")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_run_by_default(name: str, elsewhere: Path) -> None:
    """As a user runs them: on whatever paramkit chooses by itself."""
    run(ROOT / name)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name: str, backend: str, elsewhere: Path) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0, f"{result.failed} examples of {name} fail; the output has them"


def _public() -> dict[str, Any]:
    """What a user may call, by name: of the package, its modules and classes."""
    found: dict[str, Any] = {}
    for module in (paramkit, paramkit.backend, paramkit.recipes, paramkit.distributed):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value):
                methods = {n: m for n, m in vars(value).items() if inspect.isfunction(m)}
                found |= {
                    f"{module.__name__}.{name}.{n}": m
                    for n, m in methods.items()
                    if not n.startswith("_")
                }
    return found


def _lacks(value: Any, *, method: bool) -> list[str]:
    """What a docstring does not say: arguments, result, errors, an example (a method's may be its class's)."""
    text = inspect.getdoc(value) or ""
    if not inspect.isfunction(value):
        return [] if ">>>" in text else ["an example"]
    signature = inspect.signature(value)
    lacks = [n for n in signature.parameters if n != "self" and not re.search(rf"\b{n}\b.*:", text)]
    result = signature.return_annotation not in ("None", None)
    if result and not ("Returns:" in text or "Yields:" in text):
        lacks.append("what it returns")
    if not ("Raises:" in text or "never raises" in text):
        lacks.append("what it raises")
    if not method and ">>>" not in text:
        lacks.append("an example")
    return lacks


def test_public_docstrings_are_complete() -> None:
    public = _public()
    assert {"paramkit.plan", "paramkit.Plan.apply", "paramkit.distributed.Sync.step"} <= set(public)
    found = {
        name: _lacks(value, method=name.rpartition(".")[0] in public)
        for name, value in public.items()
    }
    assert not {name: lacks for name, lacks in found.items() if lacks}


def test_an_incomplete_docstring_is_seen() -> None:
    def bare(value: int) -> int:
        """Words."""
        return value

    def whole(value: int) -> int:
        """Words.

        Args:
            value: a number.

        Returns:
            The same; never raises.

        >>> 1
        1
        """
        return value

    assert _lacks(bare, method=False) == [
        "value",
        "what it returns",
        "what it raises",
        "an example",
    ]
    assert _lacks(whole, method=False) == []


def test_pages_without_python_have_none() -> None:
    """So that a page is run from its first Python block on."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in WITHOUT_PYTHON}
    assert not [n for n, text in texts.items() if any(b.language == "python" for b in blocks(text))]


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_run_says_so(name: str) -> None:
    found = unmarked((ROOT / name).read_text(encoding="utf-8"))
    assert not [f"{name}:{block.line}: a block of {block.language!r}" for block in found]


@pytest.mark.parametrize("name", ALL)
def test_commands_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        one for line in re.findall(r"^\.PHONY: (.*)$", makefile, re.M) for one in line.split()
    }
    parser = cli._parser()
    wrong = []
    for line, words in commands((ROOT / name).read_text(encoding="utf-8")):
        what = problem(words, targets, parser)
        if what:
            wrong.append(f"{name}:{line}: {' '.join(words)}: {what}")
    assert not wrong, capsys.readouterr().err


def _anchors(path: Path) -> set[str]:
    """The targets that headings make, as the usual hosts of repositories name them."""
    headings = _HEADING.findall(prose(path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", (*ALL, "CHANGELOG.md"))
def test_links_lead_somewhere(name: str) -> None:
    for target in _LINK.findall(prose((ROOT / name).read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent.joinpath(file) if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), target


def test_the_variables_of_the_environment_are_listed() -> None:
    """Those of ours that the sources name, and those of others that Python reads."""
    python = [*(ROOT / "paramkit").rglob("*.py"), ROOT / "setup.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in python)
    used = set(re.findall(r"""["'](PARAMKIT_[A-Z_]+)["'=]""", code))
    for path in (ROOT / "csrc").glob("*/*.cpp"):
        if path.parent.name == "tests":
            continue
        used |= set(re.findall(r"""getenv\("([A-Z_]+)"\)""", path.read_text(encoding="utf-8")))
    used |= set(re.findall(r"""environ(?:\.get\(|\[)["']([A-Z_]+)["']""", code))
    used -= {"PATH", "LC_ALL", "XDG_CACHE_HOME"}  # the system's, in its own meaning
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    listed = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in row.split("`")}
    assert used <= listed
    assert {name for name in listed if name.startswith("PARAMKIT_")} <= used


def test_every_page_is_in_the_contents() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    entries = [b.code.splitlines() for b in blocks(index) if b.language == "{toctree}"]
    names = {line.strip() for lines in entries for line in lines}
    assert {Path(page).stem for page in PAGES} <= names | {"index"}


def test_the_warning_is_the_one_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page cannot run it: the extension is there, or CI fails."""
    missing = loader.Extension(reason="the extension has not been built")
    monkeypatch.setattr(loader, "_find", lambda: missing)
    shown = f"RuntimeWarning: {loader._decide('auto', '').warning}\n"
    assert shown in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


def test_the_picture_is_what_its_script_draws() -> None:
    script = ROOT / "docs/pictures/life_of_a_write.py"
    namespace: dict[str, Any] = {"__name__": "picture", "__file__": str(script)}
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), namespace)
    assert namespace["draw"]() == script.with_suffix(".svg").read_text(encoding="utf-8")


def test_the_pages_build(tmp_path: Path) -> None:
    """With every warning an error: a link without a target, a docstring that cannot be read."""
    for module in ("sphinx", "myst_parser", "furo"):
        if find_spec(module) is None:
            assert not os.environ.get("CI"), f"CI must have {module}"
            pytest.skip(f"{module} is not installed")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "trees")]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    for page in PAGES:
        assert (tmp_path / "html" / f"{Path(page).stem}.html").exists()
    api = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    assert not [name for name in paramkit.__all__ if f"paramkit.{name}" not in api]


# --- the test itself: each way to be wrong is seen ------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_page_without_blocks_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no Python block"):
        run(write(tmp_path, "# Title\n\n```sh\nls\n```\n"))


def test_wrong_output_fails(tmp_path: Path) -> None:
    text = "```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n{}\n```\n"
    run(write(tmp_path, text.format("1")))
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:5"):
        run(write(tmp_path, text.format("2")))


def test_a_raising_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(write(tmp_path, "```python\n1 / 0\n```\n"))


def test_a_block_may_need_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    run(write(tmp_path, "<!-- needs: no_such_module -->\n```python\n1 / 0\n```\n"))
    with pytest.raises(ZeroDivisionError):
        run(write(tmp_path, "<!-- needs: math -->\n```python\n1 / 0\n```\n"))


def test_each_way_of_not_being_run_is_seen() -> None:
    for fence in ("py", "Python", "", "pycon", "text", "yaml", "{code-block} python"):
        for indent, ticks in (("", "```"), ("  ", "```"), ("", "~~~"), ("", "````")):
            text = f"words\n\n{indent}{ticks}{fence}\n{indent}1 / 0\n{indent}{ticks}\n"
            assert [b.language for b in unmarked(text)] == [fence]
            assert not unmarked(text.replace("words", "<!-- not run: a reason -->"))
            assert unmarked(text.replace("words", "<!-- not run: -->"))
    assert not unmarked("```python\n```\n\n```text\n```\n")
    assert unmarked("```python\n```\n\nwords\n\n```text\n```\n")


def test_wrong_commands_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(line: str) -> str:
        ((_, words),) = commands(f"```sh\n{line}\n```\n")
        return problem(words, {"test"}, cli._parser()) or ""

    assert not wrong("make test ARGS='-k plan'  # some of them")
    assert not wrong("DEBUG=1 paramkit diff a.safetensors b.safetensors")
    assert not wrong("paramkit plan --help")
    assert not wrong(".venv/bin/python -m benchmarks.publish x.json")
    assert not wrong("pip install torch")
    assert "no target tset" in wrong("make tset")
    assert "not a command line" in wrong("paramkit dif a b")
    assert "not a command line" in wrong("paramkit diff a b --colour")
    assert "no module" in wrong("python -m benchmarks.publisher x.json")
    assert "there is no tools/nothing.py" in wrong("tools/nothing.py")
