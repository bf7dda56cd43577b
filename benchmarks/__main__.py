"""Command line: ``python -m benchmarks [--only PATTERN] [--quick] [--json OUT] [--list]``."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, table
from benchmarks.cases import CASES, Case
from benchmarks.measure import run_case


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times paramkit against torch in one process and prints the table.",
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help="cases whose name holds PATTERN, or matches it as a wildcard; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds; under a minute")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the result as JSON")
    parser.add_argument("--list", action="store_true", help="list the cases and their targets")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    return parser


def _chosen(patterns: Sequence[str] | None) -> list[Case]:
    if not patterns:
        return list(CASES)
    return [
        case
        for case in CASES
        if any(part in case.name or fnmatch.fnmatch(case.name, part) for part in patterns)
    ]


def _show(result: dict[str, Any]) -> None:
    """The table: through rich where it is installed and the output is a terminal."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(table.plain(result))
        return
    console = Console()
    if not console.is_terminal:
        print(table.plain(result))
        return
    colours = {"met": "green", "noise": "yellow"}
    shown = Table(box=None, header_style="bold")
    for column, title in enumerate(table.HEADER):
        shown.add_column(title, justify="right" if 0 < column < len(table.HEADER) - 1 else "left")
    for row in table.rows(result["results"]):
        shown.add_row(*row[:-1], f"[{colours.get(row[-1], 'red')}]{row[-1]}[/]")
    console.print(shown)
    console.print(table.caption(result["machine"]), style="dim")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases; 0, or 1 on an error (with ``--strict`` also on a missed target)."""
    options = _parser().parse_args(arguments)
    cases = _chosen(options.only)
    if options.list:
        for case in cases:
            print(f"{case.name:26} >= {case.target:g}x  {case.mode:12} {case.what}")
        return 0
    if not cases:
        print(f"no case matches {options.only}; see --list", file=sys.stderr)
        return 2

    facts = machine.describe()
    results = []
    for number, case in enumerate(cases, 1):
        if sys.stderr.isatty():
            print(f"\r\033[K[{number}/{len(cases)}] {case.name}", end="", file=sys.stderr)
        results.append(run_case(case, quick=options.quick).as_dict())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)

    result = {"machine": facts, "quick": options.quick, "results": results}
    _show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    verdicts = {row["verdict"] for row in results}
    failed = "error" in verdicts or (options.strict and "missed" in verdicts)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
