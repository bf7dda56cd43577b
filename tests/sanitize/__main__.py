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

from tests import instrumented
from tests.emulation import compiler
from tests.sanitize import canary, leaks
from tests.sanitize.settings import BUILT, HERE, SANITIZERS, Sanitizer
from tests.sanitize.suite import FILES, NOT_HERE

ROOT = instrumented.ROOT
NO_TESTS = 5  # pytest's exit status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--sanitizers", default=" ".join(SANITIZERS), help="some of: %(default)s")
    parser.add_argument(
        "--tests", default="", help="files or tests, instead of all that reach csrc"
    )
    parser.add_argument("--canaries", action="store_true", help="build and canaries only")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    arguments = parser.parse_args()
    names = arguments.sanitizers.split()
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown or not names:
        parser.error(f"--sanitizers: got {unknown}, expected some of {', '.join(SANITIZERS)}")
    tests = [] if arguments.canaries else arguments.tests.split() or list(FILES)
    bad = 0
    for name in names:
        bad += run(SANITIZERS[name], tests, arguments.pytest, arguments.jobs)
    return 1 if bad else 0


def run(sanitizer: Sanitizer, tests: list[str], further: list[str], jobs: int) -> int:
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

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda test: one(sanitizer, tree, logs, test, further), tests))
    (logs / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    bad = wrong_of(results)
    tail = f", {len(bad)} with reports or failures: see {logs.relative_to(ROOT)}" if bad else ""
    say(f"{sanitizer.name}: {len(results)} files{tail or ', nothing found'}")
    return len(bad)


def wrong_of(results: list[dict[str, object]]) -> list[dict[str, object]]:
    """Those with a report or a failed test; all of them where no file had a test to run."""
    if all(result["status"] == NO_TESTS for result in results):
        return results
    return [one for one in results if one["reports"] or one["status"] not in (0, NO_TESTS)]


def one(
    sanitizer: Sanitizer, tree: Path, logs: Path, test: str, further: list[str]
) -> dict[str, object]:
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
