"""Tables from results: ``python -m benchmarks.table RESULT.json`` prints Markdown.

The README's table is printed from a committed result, never typed by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = ["HEADER", "caption", "markdown", "plain", "rows"]

HEADER = ("case", "paramkit", "torch", "GB/s", "torch GB/s", "ratio", "target", "")


def duration(nanoseconds: float) -> str:
    """A time in the unit that keeps three digits: ``418 ns``, ``4.18 us``, ``41.8 ms``."""
    for unit, scale in (("ns", 1.0), ("us", 1e3), ("ms", 1e6), ("s", 1e9)):
        if nanoseconds < 999.5 * scale or unit == "s":
            value = nanoseconds / scale
            digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def _timing(timing: Mapping[str, float] | None) -> str:
    if not timing:
        return "-"
    spread = (timing["q3"] - timing["q1"]) / timing["median"]
    return f"{duration(timing['median'])} ±{spread * 50:.0f}%"


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 9.95 else f"{value:.0f}x"


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row of text a case, in the order measured."""
    table = []
    for row in results:
        verdict = row["verdict"] if row["verdict"] != "error" else f"error: {row['error']}"
        table.append(
            (
                row["name"],
                _timing(row["ours"]),
                _timing(row["peer"]),
                f"{row['ours_gbs']:.1f}" if row["ours"] else "-",
                f"{row['peer_gbs']:.1f}" if row["peer"] else "-",
                _ratio(row["ratio"]) if row["ours"] else "-",
                f">= {row['target']:g}x",
                verdict,
            )
        )
    return table


def caption(machine: Mapping[str, Any]) -> str:
    """One sentence that says where the figures come from."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"torch {machine['torch']} ({machine['torch_capability']}), "
        f"backend {machine['backend']} ({machine['capability']}), "
        f"Python {machine['python']}, commit {machine['commit']}, {machine['date']}. "
        "Medians, ± half the interquartile range."
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result as a Markdown table with its caption."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * 6 + "---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(result["results"])]
    return "\n".join(lines) + "\n\n" + caption(result["machine"])


def plain(result: Mapping[str, Any]) -> str:
    """The same for a terminal without rich: padded columns."""
    body = [HEADER, *rows(result["results"])]
    widths = [max(len(row[column]) for row in body) for column in range(len(HEADER))]
    lines = []
    for row in body:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines) + "\n\n" + caption(result["machine"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m benchmarks.table``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file written by python -m benchmarks")
    parser.add_argument("--plain", action="store_true", help="padded columns, not Markdown")
    parser.add_argument(
        "--only", metavar="PATTERN", action="append", help="cases whose name matches this wildcard"
    )
    options = parser.parse_args(arguments)
    result = json.loads(options.result.read_text())
    if options.only:
        result["results"] = [
            entry
            for entry in result["results"]
            if any(fnmatch(entry["name"], pattern) for pattern in options.only)
        ]
    print(plain(result) if options.plain else markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
