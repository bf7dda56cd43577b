"""Command line: ``python -m benchmarks.gpu [--only PATTERN] [--quick] [--json OUT] [--list]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paramkit
from benchmarks.table import matches
from benchmarks.targets import wanted

from . import cases, facts, ready, table  # noqa: F401
from .device import Gpu
from .registry import CASES, CLOCKS, GROUPS, Case
from .run import QUICK_SECONDS, SECONDS, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Times paramkit on the current CUDA device against torch, in one process.",
        epilog="Groups: " + ", ".join(GROUPS) + ".",
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help="cases whose name holds PATTERN or matches it as a wildcard, or a group; may be repeated",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a part of the cases, small budgets: one minute"
    )
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=float,
        help=f"for the whole run ({SECONDS:g}, {QUICK_SECONDS:g} with --quick)",
    )
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the result as JSON")
    parser.add_argument("--list", action="store_true", help="list the cases and their targets")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    return parser


def _chosen(patterns: Sequence[str] | None, quick: bool) -> list[Case]:
    # Whoever names a case means it, quick or not.
    named = {case.name for case in CASES if patterns and case.name in patterns}
    return [
        case
        for case in CASES
        if matches(case.name, case.group, patterns)
        and (case.quick or not quick or case.name in named)
    ]


def _list(chosen: Sequence[Case]) -> None:
    width = max(len(case.name) for case in chosen)
    for case in chosen:
        what = f"{case.what}; against {case.peer}"
        print(f"{case.name:{width}}  {case.clock:6}  {wanted(case.targets)}  ({what})")
    for clock, meaning in CLOCKS.items():
        print(f"{clock}: {meaning}")


def _save(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all: the run may be ended at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.tmp")
    staged.write_text(json.dumps(result, indent=1) + "\n")
    staged.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases; 0, or 1 on an error (with ``--strict`` also on a missed target), or 2
    where they cannot run."""
    options = _parser().parse_args(arguments)
    chosen = _chosen(options.only, options.quick)
    if not chosen:
        print(f"no case matches {options.only}; see --list", file=sys.stderr)
        return 2
    if options.list:
        _list(chosen)
        return 0
    missing = ready.missing(["gpu"])
    if missing:
        print(*missing, sep="\n", file=sys.stderr)
        return 2
    try:
        with paramkit.backend.force("cuda"):
            result = run(
                chosen,
                Gpu(),
                facts.describe(),
                quick=options.quick,
                seconds=options.seconds,
                save=lambda part: _save(part, options.json) if options.json else None,
            )
    except paramkit.backend.BackendError as error:
        print(error, file=sys.stderr)
        return 2
    print(table.plain(result), flush=True)
    for row in result["cases"]:
        if row["verdict"] == "error":  # last, where they are seen
            print(f"error: {row['name']}: {row['detail']}", file=sys.stderr)
    verdicts = {row["verdict"] for row in result["cases"]}
    return 1 if "error" in verdicts or (options.strict and "missed" in verdicts) else 0


if __name__ == "__main__":
    raise SystemExit(main())
