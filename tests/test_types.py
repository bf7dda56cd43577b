"""The annotations, as mypy sees them with everything on and the true types of torch.

In tests/typing are programs such as users write. In them `# error: CODE` stands behind a line that mypy must
refuse; whatever else it says is a failure, and so is what it does not say.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import paramkit
import paramkit.distributed
import paramkit.typing
from tests.tiny import ROOT, Project

FOLDER = ROOT / "tests" / "typing"
PROGRAMS = sorted(FOLDER.glob("*.py"))
# Kept between runs: what takes long is to read torch.
CACHE = ROOT / ".mypy_cache" / "typing"

_SAID = re.compile(r"^(\S+?):(\d+): error: .*\[([\w-]+)\]$", re.MULTILINE)
_WANTED = re.compile(r"#.*?\berror: ([\w-]+)")


def mypy(*arguments: str, config: Path = FOLDER / "mypy.ini", path: Path = ROOT) -> tuple[int, str]:
    """Run mypy, which sees the paramkit in a folder; its exit status and all it said."""
    assert find_spec("mypy") is not None, "mypy is in the extra `test`"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), *arguments],
        cwd=FOLDER,
        env=Project.clean_environ(MYPYPATH=str(path)),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def said(output: str) -> set[tuple[str, int, str]]:
    """The errors in mypy's output: file, line, code."""
    return {(Path(name).name, int(line), code) for name, line, code in _SAID.findall(output)}


def wanted(programs: list[Path]) -> set[tuple[str, int, str]]:
    """The errors that programs ask for."""
    return {
        (path.name, number, code)
        for path in programs
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for code in _WANTED.findall(line)
    }


@pytest.fixture(scope="module")
def checked() -> str:
    status, output = mypy("--cache-dir", str(CACHE), *map(str, PROGRAMS))
    assert status in (0, 1), output  # 2: it could not do its work
    return output


def test_users_programs_are_typed_as_they_should_be(checked: str) -> None:
    expected = wanted(PROGRAMS)
    assert len(PROGRAMS) >= 5 and len(expected) >= 40
    found = said(checked)
    assert found == expected, f"not said: {expected - found}; said: {found - expected}\n{checked}"
    # Every line of its output was understood.
    rest = [line for line in checked.splitlines() if ": error: " in line]
    assert len(rest) == len(_SAID.findall(checked))


def test_the_check_can_fail(tmp_path: Path) -> None:
    """A program that holds a wrong result, a wrong argument and an Any for right is refused."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\nfrom typing_extensions import assert_type\nimport paramkit\n"
        "assert_type(paramkit.fill_(torch.zeros(2), 0), int)\n"
        "paramkit.fill_(torch.zeros(2), torch)\n"
        "assert_type(torch.zeros(2), object)\n"
        "def untyped(x):\n    return x\n"
    )
    _, output = mypy("--cache-dir", str(CACHE), str(program))
    lines = {(line, code) for _, line, code in said(output)}
    assert lines == {(4, "assert-type"), (5, "arg-type"), (6, "assert-type"), (7, "no-untyped-def")}
    assert 'of type "Tensor"' in output  # torch's types are not Any


@pytest.mark.slow
def test_the_package_is_strict_with_the_true_types_of_torch() -> None:
    """`make lint` checks it too, but knows nothing of torch."""
    status, output = mypy("--cache-dir", str(CACHE) + "-package", config=FOLDER / "package.ini")
    assert status == 0, output


def _public() -> Iterator[tuple[str, Any]]:
    """Every public function and method, by name."""
    for module in (paramkit, paramkit.backend, paramkit.recipes, paramkit.distributed):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value) and not issubclass(value, BaseException):
                for method, function in inspect.getmembers(value, inspect.isfunction):
                    if not method.startswith("_") or method == "__init__":
                        yield f"{module.__name__}.{name}.{method}", function


# Where Any is the truth: what torch says of a state dict, plain data for JSON, and what is private.
ANY_IS_RIGHT = {
    "paramkit.load_state_dict": {"state_dict"},
    "paramkit.plan": {"source"},  # of the implementation; callers see the overloads
    "paramkit.backend.Status.as_dict": {"return"},
    "paramkit.distributed.Transfer.__init__": {"source"},  # made by plan()
}


def test_nothing_public_is_any_or_without_a_type() -> None:
    seen, loose = 0, {}
    for name, function in _public():
        signature = inspect.signature(inspect.unwrap(function))
        types = {p.name: p.annotation for p in signature.parameters.values() if p.name != "self"}
        types["return"] = signature.return_annotation
        bare = {
            what
            for what, text in types.items()
            if text is inspect.Signature.empty or re.search(r"\bAny\b", str(text))
        }
        seen += 1
        if bare - ANY_IS_RIGHT.get(name, set()):
            loose[name] = bare
    assert seen > 50 and loose == {}


def test_type_checkers_are_told_that_there_are_types() -> None:
    assert (ROOT / "paramkit" / "py.typed").is_file()
    assert set(paramkit.typing.__all__) <= set(vars(paramkit.typing))
