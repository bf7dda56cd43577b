"""Lines of the package and of csrc that the suite reaches; the summary goes to tests/coverage.json.

    python tools/measure_coverage.py             the whole suite, on a build of its own
    python tools/measure_coverage.py -- -k plan  some of it; nothing is written then

The extension is built with --coverage in build/coverage/tree. Python's lines are counted by coverage.py, in
subprocesses too, those of csrc by gcov through gcovr. Not counted: programs that the tests compile by themselves
(the emulated GPU, the packing alone), and processes that are killed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests import instrumented

ROOT = instrumented.ROOT
FOLDER = ROOT / "build" / "coverage"
RESULT = ROOT / "tests" / "coverage.json"
# -O0: at -O1 and above lines are merged and moved, and the counts are those of other lines.
# Atomic counters, since torch's threads share them.
CXXFLAGS = ("-O0", "-g1", "--coverage", "-fprofile-update=atomic")
CONFIGURATION = """\
[run]
branch = true
parallel = true
source = paramkit
relative_files = true
patch = subprocess
data_file = {folder}/python/data
[report]
exclude_also =
    if TYPE_CHECKING:
    @overload
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", action="store_true", help="only read what the last run left")
    parser.add_argument("--jobs", type=int, default=1, help="processes of pytest")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args()
    tree = FOLDER / "tree"
    status = 0
    if not arguments.report:
        spread = ["-n", str(arguments.jobs), "--dist", "loadfile", "--no-loadscope-reorder"]
        status = run(tree, (spread if arguments.jobs > 1 else []) + arguments.pytest)
    result = {"python": python_lines(tree), "csrc": csrc_lines(tree)}
    show(result)
    if arguments.pytest or status:
        print(f"{RESULT.relative_to(ROOT)} is left as it is: not the whole suite, or it failed")
    else:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {RESULT.relative_to(ROOT)}")
    return status


def run(tree: Path, arguments: list[str]) -> int:
    """Build, and run the suite; its exit status."""
    print(f"==> building in {tree.relative_to(ROOT)} (minutes the first time)", flush=True)
    instrumented.copy(tree, {})
    instrumented.build(tree, CXXFLAGS, ["--coverage"], FOLDER / "build.log")
    for old in [*FOLDER.rglob("*.gcda"), *(FOLDER / "python").glob("data*")]:
        old.unlink()
    (FOLDER / "python").mkdir(exist_ok=True)
    configuration = FOLDER / "coveragerc"
    configuration.write_text(CONFIGURATION.format(folder=FOLDER), encoding="utf-8")
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={configuration}"]
    environ = {**os.environ, "PARAMKIT_BUILD": "require"}
    done = subprocess.run(
        [*command, "-m", "pytest", "-q", *arguments], cwd=tree, env=environ, check=False
    )
    return done.returncode


def python_lines(tree: Path) -> dict[str, Any]:
    """By file: statements, those reached, the lines that were not; and the totals."""
    coverage = [sys.executable, "-m", "coverage"]
    rcfile = f"--rcfile={FOLDER / 'coveragerc'}"
    told = FOLDER / "python" / "report.json"
    if list((FOLDER / "python").glob("data.*")):
        subprocess.run([*coverage, "combine", "-q", rcfile], cwd=tree, check=True)
    subprocess.run([*coverage, "json", "-q", rcfile, "-o", str(told)], cwd=tree, check=True)
    report = json.loads(told.read_text(encoding="utf-8"))
    files = {
        name: entry(
            file["summary"]["num_statements"],
            file["summary"]["covered_lines"],
            file["missing_lines"],
        )
        for name, file in report["files"].items()
    }
    return with_total(files)


def csrc_lines(tree: Path) -> dict[str, Any]:
    """The same of csrc: a line counts once, however often a header or a kernel's source is compiled."""
    told = FOLDER / "csrc.json"
    command = [sys.executable, "-m", "gcovr", "--root", str(tree), "--filter", "csrc/"]
    # A function inlined into several files has one entry for each.
    command += ["--merge-mode-functions=merge-use-line-min", "--gcov-ignore-parse-errors=all"]
    command += ["--object-directory", str(tree / "build"), "--json", str(told)]
    subprocess.run(command, cwd=tree, check=True)
    files = {}
    for file in json.loads(told.read_text(encoding="utf-8"))["files"]:
        counts: dict[int, int] = {}
        for line in file["lines"]:
            if not line.get("gcovr/noncode") and not line.get("gcovr/excluded"):
                number = line["line_number"]
                counts[number] = counts.get(number, 0) + line["count"]
        missed = sorted(number for number, count in counts.items() if not count)
        files[file["file"]] = entry(len(counts), len(counts) - len(missed), missed)
    return with_total(files)


def entry(lines: int, reached: int, missed: list[int]) -> dict[str, Any]:
    return {"lines": lines, "reached": reached, "missed": runs_of(missed)}


def runs_of(numbers: list[int]) -> str:
    """
    >>> runs_of([1, 2, 3, 7])
    '1-3 7'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def with_total(files: dict[str, Any]) -> dict[str, Any]:
    lines = sum(file["lines"] for file in files.values())
    reached = sum(file["reached"] for file in files.values())
    return {"lines": lines, "reached": reached, "files": dict(sorted(files.items()))}


def show(result: dict[str, Any]) -> None:
    for part, found in result.items():
        for name, file in found["files"].items():
            print(f"{percent(file):>7}  {file['lines']:5}  {name:44}  {file['missed'][:80]}")
        print(f"{percent(found):>7}  {found['lines']:5}  {part}, in all")


def percent(found: dict[str, Any]) -> str:
    return f"{100 * found['reached'] / max(found['lines'], 1):.1f} %"


if __name__ == "__main__":
    sys.exit(main())
