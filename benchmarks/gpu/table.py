"""The table of a GPU result: ``python -m benchmarks.gpu.table RESULT.json`` prints it.

Plain text in padded columns, or Markdown; nothing but the standard library is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import text
from benchmarks.table import chosen, load, summary

__all__ = ["HEADER", "caption", "limits_line", "markdown", "plain", "rows"]

HEADER = (
    "case",
    "paramkit",
    "torch",
    "against",
    "others",
    "clock",
    "GB/s",
    "of limit",
    "launches",
    "ratio",
    "target",
    "verdict",
)
WORDS = {"case", "against", "others", "clock", "target", "verdict"}


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    sides, facts = row["sides"], row.get("facts", {})
    own = sides.get("paramkit")
    others = [
        f"{name} {text.duration(side['median_ns'])}"
        for name, side in sides.items()
        if name not in ("paramkit", "torch")
    ]
    launches = facts.get("launches")
    return (
        row["name"],
        text.timing(own),
        text.timing(sides.get("torch")),
        row["peer"],
        ", ".join(others),
        row["clock"],
        f"{own['gbs']:.1f}" if own else "",
        text.share(row["share_of_limit"]) if row["limit"] else "",
        "" if launches is None else f"{launches:g}",
        text.ratio(row["ratio"]["value"]) if row["ratio"] else "",
        row["wanted"],
        row["verdict"] + (f": {row['detail']}" if row["detail"] else ""),
    )


def rows(cases: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row of text a case, in the order measured."""
    return [_cells(row) for row in cases]


def caption(machine: Mapping[str, Any]) -> str:
    """Where the figures come from."""
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    return (
        f"{machine['gpu']} (compute capability {machine['gpu_capability']}, "
        f"{machine['multiprocessors']} multiprocessors, {text.size(machine['gpu_memory'])})"
        f"{driver}, CUDA {machine['cuda']}; {machine['cpu']}, {machine['cores']} cores; "
        f"torch {machine['torch']}, Python {machine['python']}, commit {machine['commit']}, "
        f"{machine['date']}. Medians, ± half the interquartile range."
    )


def limits_line(limits: Mapping[str, Any]) -> str:
    """One sentence with the limits of the run."""
    words = {"copy": "copy on the device", "to_device": "to the device", "to_host": "to the host"}
    parts = [
        f"{words[what]} {found['gbs']:.1f} GB/s ({found['loop']})"
        for what in words
        if (found := limits.get(what))
    ]
    return f"The limits: {'; '.join(parts)}." if parts else "No limit was measured."


def _footer(result: Mapping[str, Any]) -> list[str]:
    left_out = {
        f"{name}: {why}"
        for row in result["cases"]
        for name, why in row.get("facts", {}).get("left_out", {}).items()
    }
    lines = [summary(result), caption(result["machine"]), limits_line(result["limits"])]
    lines += [f"Left out: {each}." for each in sorted(left_out)]
    return lines + (["A quick run: small budgets, a part of the cases."] if result["quick"] else [])


def _groups(
    result: Mapping[str, Any],
) -> list[tuple[str, list[tuple[str, ...]], list[int]]]:
    """Title, rows and the columns that hold something, of each group that has cases."""
    found = []
    for group in result["groups"]:
        body = rows([row for row in result["cases"] if row["group"] == group["name"]])
        if body:
            used = [at for at in range(len(HEADER)) if any(row[at] for row in body)]
            found.append((group["title"], body, used))
    return found


def plain(result: Mapping[str, Any]) -> str:
    """For a terminal: padded columns."""
    lines: list[str] = []
    for title, body, columns in _groups(result):
        lines.append(title)
        widths = {at: max(len(row[at]) for row in (HEADER, *body)) for at in columns}
        for row in (HEADER, *body):
            cells = [
                row[at].ljust(widths[at]) if HEADER[at] in WORDS else row[at].rjust(widths[at])
                for at in columns
            ]
            lines.append("  " + "  ".join(cells).rstrip())
        lines.append("")
    return "\n".join([*lines, *_footer(result)])


def markdown(result: Mapping[str, Any], level: str = "###") -> str:
    """For a document: a table for each group."""
    lines = [line for each in _footer(result) for line in (each, "")]
    for title, body, columns in _groups(result):
        lines += [f"{level} {title}", ""]
        lines.append("| " + " | ".join(HEADER[at] for at in columns) + " |")
        lines.append("|" + "".join("---|" if HEADER[at] in WORDS else "---:|" for at in columns))
        lines += ["| " + " | ".join(row[at] for at in columns) + " |" for row in body] + [""]
    return "\n".join(lines).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m benchmarks.gpu.table``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file written by python -m benchmarks.gpu")
    parser.add_argument("--markdown", action="store_true", help="Markdown, not padded columns")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help="cases whose name holds PATTERN or matches it as a wildcard, or a group; may be repeated",
    )
    options = parser.parse_args(arguments)
    result = chosen(load(options.result), options.only)
    if "gpu" not in result["machine"]:
        print(
            f"{options.result} is no result of a GPU: python -m benchmarks.table", file=sys.stderr
        )
        return 2
    if not result["cases"]:
        print("no case of the result matches", file=sys.stderr)
        return 2
    print(markdown(result) if options.markdown else plain(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
