"""Take out every check of the check stage, one at a time, and see that a test fails.

    python tools/remove_checks.py [--python] [--missing] [FOLDER]      make checks

In a copy of the tree every check asks first whether it is still there (`tools/checks`). One run of
the tests notes which tests make which check refuse something. Then, check by check, those tests run
without it until one fails. The table is written to tests/removed_checks.json; the exit status is 1
if no test noticed a check that is not excused there.

FOLDER keeps the copy, its build and the notes of the first run for the next time. With --python the
extension is left as it is, and the rows of its checks in the table too. With --missing only checks
without a test in the table are tried.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.checks import tree  # noqa: E402
from tools.checks.python_sites import Site  # noqa: E402

TABLE = ROOT / "tests" / "removed_checks.json"
# Those that ask for errors; tests of files, commands, builds and several ranks say nothing of these checks.
TESTS = (
    "errors_ops", "errors", "ops", "foreach", "dtypes", "autograd", "dispatcher", "hard_cases",
    "load_state_dict", "meta", "patterns", "plan", "recorder", "resolve", "rules", "regions", "conflicts",
    "casting_policy", "fills", "ties", "torn", "transplant", "verify", "writes", "stream", "invert",
    "suggestions", "exchange", "sharded", "sharded_plans", "sources", "opinfo", "checks", "composes", "compare",
    "life_cycle", "references", "boxes", "concurrency", "claims", "patch_torch", "iterate", "compile", "faults_memory",
)  # fmt: skip
MOST = 60
SECONDS = 300


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PARAMKIT_")}
    return {**kept, "PARAMKIT_BUILD": "require", **more}


def pytest(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tools.checks.plugin",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment(**more), capture_output=True, text=True
    )  # fmt: skip


def record(folder: Path) -> dict[str, list[str]]:
    """Check -> the tests in which it refused something, the quickest first. Goes on where it was."""
    notes = folder / "refused"
    notes.mkdir(exist_ok=True)
    for name in TESTS:
        if (notes / f"{name}.jsonl").exists() or not (folder / f"tests/test_{name}.py").exists():
            continue
        partial = notes / f"{name}.partial"
        partial.write_text("", encoding="utf-8")
        run = pytest(
            folder,
            f"tests/test_{name}.py",
            PARAMKIT_CHECK_HITS=str(folder / "hits.txt"),
            PARAMKIT_CHECK_LOG=str(partial),
        )
        print(f"{name}: {(run.stdout.splitlines() or [run.stderr[-500:]])[-1]}", flush=True)
        partial.rename(notes / f"{name}.jsonl")
    tests: dict[str, list[tuple[float, str]]] = defaultdict(list)
    lines = [
        line
        for log in notes.glob("*.jsonl")
        for line in log.read_text(encoding="utf-8").splitlines()
    ]
    for line in lines:
        node, seconds, checks = json.loads(line)
        for check in checks if " at 0x" not in node else ():  # another address in every run
            tests[check].append((seconds, node))
    # Those made for it first, then the quickest.
    made_for_it = "tests/test_checks.py"
    return {
        check: [node for _, node in sorted(found, key=lambda t: (made_for_it not in t[1], *t))]
        for check, found in tests.items()
    }


def noticed(folder: Path, site: Site, tests: list[str]) -> str | None:
    """The test that fails without the check, or None. In a fork, so that torch is imported once."""
    failed = folder / "failed.txt"
    failed.write_text("", encoding="utf-8")
    child = os.fork()
    if child == 0:
        os.environ["PARAMKIT_CHECK_REMOVED"] = site.key
        os.environ["PARAMKIT_CHECK_FAILED"] = str(failed)
        os.chdir(folder)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        import pytest as runner

        signal.alarm(SECONDS)  # a check may keep a loop from running for ever
        code = runner.main(
            [
                *tests,
                "-x",
                "-q",
                "--assert=plain",
                "-p",
                "no:cacheprovider",
                "-p",
                "tools.checks.plugin",
            ]
        )
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (0, -signal.SIGALRM):  # of a test that ends after this time alone nobody can tell
        return None
    if code > 1:
        raise SystemExit(f"pytest could not run {tests}: {code}")
    found = failed.read_text(encoding="utf-8").splitlines()
    return found[0] if found else f"{tests[0]} (ended by signal {-code})"


def main(arguments: list[str]) -> int:
    python_only = "--python" in arguments
    missing_only = "--missing" in arguments
    arguments = [one for one in arguments if not one.startswith("--")]
    folder = Path(
        arguments[0] if arguments else tempfile.mkdtemp(prefix="paramkit-checks-")
    ).resolve()
    sites_file = folder / "sites.json"
    if sites_file.exists():
        sites = [Site(**one) for one in json.loads(sites_file.read_text(encoding="utf-8"))]
    else:
        sites = tree.make(folder, build=not python_only)
        sites_file.write_text(json.dumps([vars(site) for site in sites]), encoding="utf-8")
    print(f"{len(sites)} checks, in {folder}")
    tests = record(folder)
    # From here on this process is the copy's.
    sys.path[0] = str(folder)
    os.environ.update(environment())
    import torch  # noqa: F401

    import paramkit

    assert Path(paramkit.__file__).is_relative_to(folder), paramkit.__file__
    before = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else []
    excused = {
        (row["file"], row["function"], row["check"]): row["excused"]
        for row in before
        if "excused" in row
    }
    known = {
        (row["file"], row["function"], row["check"]): row["test"]
        for row in before
        if row["test"] and missing_only
    }
    rows, missed = [], 0
    for site in sites:
        candidates = tests.get(site.key, [])
        test = known.get((site.file, site.function, site.check))
        if test is None and candidates:
            test = noticed(folder, site, candidates[:MOST])
        row = {"file": site.file, "function": site.function, "check": site.check, "test": test}
        if test is None:
            reason = excused.get((site.file, site.function, site.check))
            if reason is not None:
                row["excused"] = reason
            else:
                missed += 1
                print(
                    f"not noticed ({len(candidates)} tests reach it): {site.key} {site.function}: {site.check}"
                )
        rows.append(row)
        if test is not None:
            print(f"{site.key} {site.function}: {test}", flush=True)
    if python_only:
        rows += [row for row in before if row["file"].startswith("csrc/")]
    TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    caught = sum(row["test"] is not None for row in rows)
    print(
        f"{len(rows)} checks: {caught} noticed, {len(rows) - caught - missed} excused, {missed} not noticed"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
