"""The documents tell the truth: every Python block runs, every shown output is what is printed.

In a file, blocks run in order in one namespace. A `text` block right after a `python` block is what
that block prints; `...` in it stands for anything. `<!-- needs: MODULE -->` right before a block leaves
it out where the module is not installed.
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
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import paramkit

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"<!-- needs: (\w+) -->\s*\Z")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)

# The extension is not a Python file, and importing __main__ is for running it.
_LEFT_OUT = ("paramkit._C", "paramkit._cuda", "paramkit.__main__")
_FOUND = (module.name for module in pkgutil.walk_packages(paramkit.__path__, "paramkit."))
MODULES = ["paramkit", *sorted(name for name in _FOUND if name not in _LEFT_OUT)]


@dataclass(frozen=True)
class Block:
    """A Python block: where it starts, its code, what it prints, the module it cannot do without."""

    line: int
    code: str
    output: str | None
    needs: str | None


def python_blocks(text: str) -> list[Block]:
    """The Python blocks of a Markdown text, in order."""
    fences = list(_FENCE.finditer(text))
    blocks = []
    for i, fence in enumerate(fences):
        if fence[2] != "python":
            continue
        after = fences[i + 1] if i + 1 < len(fences) else None
        shown = (
            after is not None
            and after[2] == "text"
            and not text[fence.end() : after.start()].strip()
        )
        needs = _NEEDS.search(text, 0, fence.start())
        blocks.append(
            Block(
                line=text.count("\n", 0, fence.start(3)),
                code=fence[3],
                output=after[3] if shown and after is not None else None,
                needs=needs[1] if needs else None,
            )
        )
    return blocks


def run(path: Path) -> None:
    """Run the blocks of a document, and compare what they print with what is shown."""
    blocks = python_blocks(path.read_text(encoding="utf-8"))
    assert blocks, f"{path.name} has no Python block"
    checker = doctest.OutputChecker()
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in blocks:
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


def test_public_functions_have_examples() -> None:
    public = {name: getattr(paramkit, name) for name in paramkit.__all__}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f)}
    assert functions
    assert not [name for name, f in functions.items() if ">>>" not in (f.__doc__ or "")]


@pytest.mark.parametrize("name", (*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md"))
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    prose = _FENCE.sub("", text)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in _HEADING.findall(prose)}
    for target in _LINK.findall(prose):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        assert not file or (ROOT / name).parent.joinpath(file).exists(), target
        assert file or anchor in anchors, target


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
