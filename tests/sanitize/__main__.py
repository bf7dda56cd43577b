"""Build with a sanitizer, let its canaries loose, run the suite: ``python -m tests.sanitize``."""

from __future__ import annotations

import argparse
import glob
import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from tests import instrumented
from tests.emulation import compiler
from tests.sanitize import canary, leaks
from tests.sanitize.settings import BUILT, HERE, SANITIZERS, Sanitizer
from tests.sanitize.suite import FILES, NOT_HERE

ROOT = instrumented.ROOT
NO_TESTS = 5  # pytest's exit status
Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--sanitizers", default=" ".join(SANITIZERS), help="some of: %(default)s")
    parser.add_argument(
        "--tests", default="", help="files or tests, instead of all that reach csrc"
    )
    parser.add_argument("--canaries", action="store_true", help="build and canaries only")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    parser.add_argument(
        "--resume", action="store_true", help="leave out the files that passed on these sources"
    )
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    arguments = parser.parse_args()
    names = arguments.sanitizers.split()
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown or not names:
        parser.error(f"--sanitizers: got {unknown}, expected some of {', '.join(SANITIZERS)}")
    tests = [] if arguments.canaries else arguments.tests.split() or list(FILES)
    bad = 0
    for name in names:
        bad += run(SANITIZERS[name], tests, arguments.pytest, arguments.jobs, arguments.resume)
    return 1 if bad else 0


def run(sanitizer: Sanitizer, tests: list[str], further: list[str], jobs: int, resume: bool) -> int:
    """All of it for one sanitizer; the number of files with a report or a failed test."""
    missing = sanitizer.missing()
    if missing:
        raise SystemExit(f"{sanitizer.name}: this compiler has no {', '.join(missing)}")
    tree = ROOT / BUILT / sanitizer.name
    logs = ROOT / BUILT / f"{sanitizer.name}-logs"
    logs.mkdir(parents=True, exist_ok=True)

    say(f"{sanitizer.name}: building in {tree.relative_to(ROOT)} (minutes the first time)")
    extra = {HERE / name: Path("csrc") / "canary" / name for name in sanitizer.sources}
    instrumented.copy(tree, extra)
    binary = instrumented.build(tree, sanitizer.cxxflags, sanitizer.ldflags, logs / "build.log")

    wrong = canary.check(sanitizer, binary, logs, sanitizer.sources)
    if wrong:
        print("\n".join(wrong))
        raise SystemExit(f"{sanitizer.name}: a canary lives: no run over the suite would mean much")
    caught = [one.name for one in canary.CANARIES if one.sanitizer == sanitizer.name]
    say(f"{sanitizer.name}: the canaries did as they must: {', '.join(caught)}")

    record = Record(logs / "results.json", instrumented.digest(tree), further)
    passed = record.passed() if resume else {}
    if passed:
        say(f"{sanitizer.name}: {len(passed)} files passed on these sources before")

    def result(test: str) -> Result:
        return passed.get(test) or record.add(one(sanitizer, tree, logs, test, further))

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(result, tests))
    bad = wrong_of(results)
    tail = f", {len(bad)} with reports or failures: see {logs.relative_to(ROOT)}" if bad else ""
    say(f"{sanitizer.name}: {len(results)} files{tail or ', nothing found'}")
    return len(bad)


def wrong_of(results: list[Result]) -> list[Result]:
    """Those with a report or a failed test; all of them where no file had a test to run."""
    if all(result["status"] == NO_TESTS for result in results):
        return results
    return [one for one in results if is_wrong(one)]


def is_wrong(result: Result) -> bool:
    return bool(result["reports"]) or result["status"] not in (0, NO_TESTS)


class Record:
    """The results of the files so far, kept after each: a run over the suite takes the better part of an hour.

    Args:
        file: where they are kept.
        sources: digest of what the binary and the tests were made of.
        further: pytest's further arguments, which say what of a file has run.
    """

    def __init__(self, file: Path, sources: str, further: list[str]) -> None:
        self._file, self._lock = file, Lock()
        self._made_of: dict[str, object] = {"sources": sources, "arguments": further}
        self._results: dict[str, Result] = {}
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if {name: kept[name] for name in self._made_of} == self._made_of:
                self._results = {one["test"]: one for one in kept["results"]}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or cut short: all of it runs

    def passed(self) -> dict[str, Result]:
        """By test, those without a report or a failure."""
        return {test: one for test, one in self._results.items() if not is_wrong(one)}

    def add(self, result: Result) -> Result:
        with self._lock:
            self._results[str(result["test"])] = result
            kept = {**self._made_of, "results": [self._results[k] for k in sorted(self._results)]}
            new = self._file.with_suffix(".new")
            new.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            new.replace(self._file)
        return result


def one(sanitizer: Sanitizer, tree: Path, logs: Path, test: str, further: list[str]) -> Result:
    """The tests of one file, in a process of their own: what is found ends it."""
    # The name is part of the sanitizer's options, which a colon ends.
    stem = test.removeprefix("tests/").replace("/", "-").replace("::", "-").replace(":", "-")
    log, output = logs / stem, logs / f"{stem}.out"
    for old in logs.glob(f"{glob.escape(stem)}.*"):
        old.unlink()
    command = [*sanitizer.prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if sanitizer.name == "address":
        command += ["-p", "tests.sanitize.leaks"]
    for left_out, _ in NOT_HERE.get(sanitizer.name, ()):
        command += ["--deselect", left_out]
    environ = sanitizer.process(log)
    if sanitizer.name != "thread":
        # What the tests compile by themselves, the emulated GPU and the packing, gets the sanitizer too.
        flags = [f"-fsanitize={sanitizer.name}", *sanitizer.flags]
        environ["CXX"] = shlex.join([*compiler(), *flags])
    environ["PARAMKIT_BUILD"] = "require"  # no test may be skipped for want of the binary
    start = time.monotonic()
    with output.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [*command, *further, test],
            cwd=tree,
            env=environ,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    seconds = time.monotonic() - start
    reports = sanitizer.reports(log)
    if sanitizer.name == "address":
        errors = [text for text in reports if "ERROR: AddressSanitizer" in text]
        reports = errors + [leak for text in reports for leak in leaks.ours(text)]
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    summary = lines[-1].strip("= ") if lines else ""
    print(f"  {test}: {summary}; {len(reports)} reports, status {done.returncode}", flush=True)
    return {
        "test": test,
        "seconds": round(seconds),
        "status": done.returncode,
        "summary": summary,
        "reports": len(reports),
    }


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
