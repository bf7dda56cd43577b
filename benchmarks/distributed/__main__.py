"""Command line: ``python -m benchmarks.distributed [--quick] [--only CASE] [--out FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine, table
from benchmarks.targets import wanted

from .cases import CASES
from .ranks import launch
from .registry import GROUP
from .result import lines, result, rows

__all__ = ["main"]

TIMEOUT = {"full": 1200.0, "quick": 180.0, "tiny": 60.0}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument(
        "--only",
        metavar="CASE",
        action="append",
        help="cases whose name holds CASE or matches it as a wildcard; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rounds")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument(
        "--folder", metavar="FOLDER", type=Path, help="for checkpoints of 2 GiB; removed afterwards"
    )
    parser.add_argument("--timeout", type=float, help="seconds for a case")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--list", action="store_true", help="list the cases and their targets")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases, each in processes of its own; 0, or 1 on an error."""
    options = _parser().parse_args(arguments)
    cases = [case for case in CASES if table.matches(case.name, GROUP, options.only)]
    if not cases:
        print(f"no case matches {options.only}; see --list", file=sys.stderr)
        return 2
    if options.list:
        for case in cases:
            print(f"{case.name:20} {wanted(case.targets):55} {case.what}")
        return 0
    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    facts = machine.describe()
    found = []
    for number, case in enumerate(cases, 1):
        if sys.stderr.isatty():
            print(f"[{number}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="paramkit-", dir=options.folder) as folder:
            timeout = options.timeout or TIMEOUT[size]
            measured = launch([case.name], size, Path(folder), timeout)
        found += rows(case, measured[case.name])
    made = result(found, facts, size)
    table.show(made)
    for line in lines(found):
        print(line)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(made, indent=1) + "\n")
    verdicts = {row["verdict"] for row in found}
    return 1 if "error" in verdicts or (options.strict and "missed" in verdicts) else 0


if __name__ == "__main__":
    raise SystemExit(main())
