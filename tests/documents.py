"""Documents as data: their blocks of code, and what each must print."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Sphinx's own; `make docs` judges them.
DIRECTIVES = ("{toctree}", "{include}", "{eval-rst}")

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"<!-- needs: (\w+) -->\s*\Z")
_NOT_RUN = re.compile(r"<!-- not run: (\S[^>]*?) -->\s*\Z")
_MODULE = re.compile(r"(?:\S*/)?python3? -m (\S+)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: the line before its first one, as a traceback counts.
        language: what stands behind the fence.
        code: its text.
        output: what a Python block prints, where that is shown.
        needs: the module that it cannot do without.
        why_not: why nothing runs or compares it.
    """

    line: int
    language: str
    code: str
    output: str | None = None
    needs: str | None = None
    why_not: str | None = None


def prose(text: str) -> str:
    """The text without its blocks."""
    return _FENCE.sub("", text)


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order; one that is the output of another is left out."""
    fences = list(_FENCE.finditer(text))
    found = []
    shown: set[int] = set()
    for i, fence in enumerate(fences):
        if i in shown:
            continue
        language, output = fence[3].strip(), None
        if language == "python" and i + 1 < len(fences):
            after = fences[i + 1]
            if after[3].strip() == "text" and not text[fence.end() : after.start()].strip():
                shown.add(i + 1)
                output = after[4]
        needs = _NEEDS.search(text, 0, fence.start())
        why_not = _NOT_RUN.search(text, 0, fence.start())
        found.append(
            Block(
                text.count("\n", 0, fence.start(4)),
                language,
                fence[4],
                output,
                needs[1] if needs else None,
                why_not[1] if why_not else None,
            )
        )
    return found


def unmarked(text: str) -> list[Block]:
    """The blocks that no test looks at, and that do not say so."""
    seen = ("python", "sh", *DIRECTIVES)
    return [
        block
        for block in blocks(text)
        if block.why_not is None and block.language.split(" ", 1)[0] not in seen
    ]


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line and words of each command in the `sh` blocks, comments and continuations taken care of."""
    for block in blocks(text):
        if block.language != "sh" or block.why_not:
            continue
        code = block.code.replace("\\\n", " ")
        for k, line in enumerate(code.splitlines()):
            for one in re.split(r"\s(?:&&|\|)\s", line):
                words = shlex.split(one, comments=True)
                while words and re.match(r"\w+=", words[0]):  # the environment of one command
                    words = words[1:]
                if words:
                    yield block.line + k + 1, words


def problem(words: list[str], targets: set[str], parser: argparse.ArgumentParser) -> str | None:
    """What is wrong with a command, where it is one of this project's.

    Args:
        words: the command.
        targets: of the Makefile.
        parser: that of `paramkit`.
    """
    name = words[0]
    if name == "make":
        unknown = [w for w in words[1:] if "=" not in w and w not in targets]
        return f"make has no target {', '.join(unknown)}" if unknown else None
    if name == "paramkit":
        if words[1:2] == ["demo"]:
            return None  # reads its own arguments
        try:
            parser.parse_args(words[1:])
        except SystemExit as stop:
            return None if stop.code == 0 else "not a command line of paramkit"
        return None
    module = _MODULE.match(" ".join(words))
    if module and module[1].split(".")[0] in ("paramkit", "benchmarks", "tests"):
        path = ROOT / module[1].replace(".", "/")
        there = path.is_dir() or path.with_suffix(".py").is_file()
        return None if there else f"there is no module {module[1]}"
    if re.match(r"(?:\./)?(?:benchmarks|tools|docs|examples|tests|\.ci)/", name):
        return None if (ROOT / name).exists() else f"there is no {name}"
    return None  # another program's
