"""Command line: ``python -m benchmarks [--only PATTERN] [--quick] [--json OUT] [--compare BASE]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, table
from benchmarks.cases import CASES, GROUPS, Case
from benchmarks.run import run
from benchmarks.targets import wanted
from tests import mixture


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times paramkit against torch, numpy and plain C in one process.",
        epilog="Groups: " + ", ".join(GROUPS) + ".",
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help="cases whose name holds PATTERN or matches it as a wildcard, or a group; may be repeated",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small budgets, no numpy, a fixed part of the conversions; under two minutes",
    )
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the result as JSON")
    parser.add_argument(
        "--compare", metavar="BASE", type=Path, help="compare ratios with an earlier result"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 when a target is missed, or --compare finds something slower",
    )
    parser.add_argument("--list", action="store_true", help="list the cases and their targets")
    parser.add_argument(
        "--sizes", action="store_true", help="print the size table of the mixture of experts"
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests
    return parser


def _chosen(patterns: Sequence[str] | None, quick: bool) -> list[Case]:
    # Whoever names a case means it, quick or not.
    named = {case.name for case in CASES if patterns and case.name in patterns}
    return [
        case
        for case in CASES
        if table.matches(case.name, case.group, patterns)
        and (case.quick or not quick or case.name in named)
    ]


def _base(path: Path, patterns: Sequence[str] | None, cases: Sequence[Case]) -> dict[str, Any]:
    """The earlier result without the cases that this run leaves out on purpose."""
    base = table.chosen(table.load(path), patterns)
    left_out = {case.name for case in CASES} - {case.name for case in cases}
    return {**base, "cases": [row for row in base["cases"] if row["name"] not in left_out]}


def _list(cases: Sequence[Case]) -> None:
    width = max(len(case.name) for case in cases)
    for case in cases:
        print(f"{case.name:{width}}  {case.mode:11}  {wanted(case.targets)}  ({case.what})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases; 0, or 1 on an error (with ``--strict`` also on a missed target)."""
    options = _parser().parse_args(arguments)
    if options.sizes:
        print(mixture.table())
        return 0
    cases = _chosen(options.only, options.quick)
    if not cases:
        print(f"no case matches {options.only}; see --list", file=sys.stderr)
        return 2
    if options.list:
        _list(cases)
        return 0
    base = _base(options.compare, options.only, cases) if options.compare else None

    result = run(cases, quick=options.quick, tiny=options.tiny)
    table.show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    slower = False
    if base is not None:
        print()
        print(compare.table(base, result))
        slower = compare.worse(compare.changes(base, result))

    verdicts = {row["verdict"] for row in (*result["cases"], *result["groups"])}
    failed = "error" in verdicts
    if options.strict:
        failed = failed or slower or "missed" in verdicts
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
