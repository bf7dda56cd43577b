"""Tables from results: ``python -m benchmarks.table RESULT.json`` prints Markdown.

Tables in documents are printed from a committed result (`benchmarks.publish`), never typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import matrix, text

__all__ = ["HEADER", "chosen", "load", "markdown", "matches", "plain", "rows", "summary"]

SCHEMA = 2

HEADER = (
    "case",
    "paramkit",
    "torch",
    "numpy",
    "GB/s",
    "of limit",
    "of plain copy",
    "ratio",
    "growth",
    "target",
    "verdict",
)
MATRIX = "casts"


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        SystemExit: the file is none, or an older benchmark wrote it.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise SystemExit(f"{path} was not written by this benchmark; run it again with --json")
    return result


def matches(name: str, group: str, patterns: Sequence[str] | None) -> bool:
    """Whether a case is meant: by a part of its name, a wildcard, or its group. None means all."""
    return not patterns or any(
        part in name or fnmatch(name, part) or fnmatch(group, part) for part in patterns
    )


def chosen(
    result: Mapping[str, Any], only: Sequence[str] | None, groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """The result with some of its cases."""
    cases = [
        row
        for row in result["cases"]
        if matches(row["name"], row["group"], only) and (not groups or row["group"] in groups)
    ]
    return {**result, "cases": cases}


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    sides = row["sides"]
    own = sides.get("paramkit")
    if row["mode"] == "memory":
        used = row["temporary_bytes"] or {}
        times = [f"{used[name]:,} bytes" if name in used else "" for name in ("paramkit", "torch")]
    else:
        times = [text.timing(own), text.timing(sides.get("torch"))]
    verdict = row["verdict"] + (f": {row['detail']}" if row["detail"] else "")
    return (
        row["name"],
        *times,
        text.timing(sides.get("numpy")),
        f"{own['gbs']:.1f}" if own and own["gbs"] else "",
        text.share(row["share_of_limit"]),
        text.share(row["share_of_ceiling"]),
        text.ratio(row["ratio"]["value"]) if row["ratio"] else "",
        text.ratio(row["growth"]["value"]) if row.get("growth") else "",
        row["wanted"],
        verdict,
    )


def rows(cases: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row of text a case, in the order measured."""
    return [_cells(row) for row in cases]


def _groups(result: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Groups in order with the cases that are there."""
    return [
        (group, cases)
        for group in result["groups"]
        if (cases := [row for row in result["cases"] if row["group"] == group["name"]])
    ]


def _group_line(group: Mapping[str, Any], cases: int) -> str:
    if not group.get("mean") or (not group["target"] and cases < 2):
        return ""
    line = f"Geometric mean of the ratios: {text.ratio(group['mean']['value'])}"
    if group.get("target"):
        line += f" (target >= {group['target']:g}x): {group['verdict']}"
        line += f": {group['detail']}" if group["detail"] else ""
    return line + "."


def summary(result: Mapping[str, Any]) -> str:
    """How many cases met their targets."""
    found = Counter(row["verdict"] for row in result["cases"])
    words = [f"{found[word]} {word}" for word in ("met", "noise", "missed", "unknown", "error")]
    shown = ", ".join(word for word in words if not word.startswith("0 "))
    return f"{len(result['cases'])} cases: {shown}."


def _used(cases: Sequence[Mapping[str, Any]], body: Sequence[Sequence[str]]) -> list[int]:
    """The columns that hold something; the others are left out."""
    return [at for at in range(len(HEADER)) if any(row[at] for row in body)]


def _markdown_rows(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    body = rows(cases)
    columns = _used(cases, body)
    right = {"case": "---|", "target": "---|", "verdict": "---|"}
    lines = ["| " + " | ".join(HEADER[at] for at in columns) + " |"]
    lines.append("|" + "".join(right.get(HEADER[at], "---:|") for at in columns))
    lines += ["| " + " | ".join(row[at] for at in columns) + " |" for row in body]
    return lines


def footer(result: Mapping[str, Any]) -> list[str]:
    quick = ["A quick run: small budgets, a part of the conversions."] if result["quick"] else []
    return [text.caption(result["machine"]), text.limits_line(result["limits"]), *quick]


def flat(result: Mapping[str, Any]) -> str:
    """One Markdown table of all cases with its caption: for a short selection."""
    return "\n".join([*_markdown_rows(result["cases"]), "", *footer(result)])


def markdown(result: Mapping[str, Any], level: str = "###") -> str:
    """The whole result in Markdown: a table for each group, conversions as a matrix."""
    lines = [summary(result), "", *footer(result)]
    for group, cases in _groups(result):
        lines += ["", f"{level} {group['title']}", ""]
        if group["name"] == MATRIX and len(cases) > 1:
            lines.append(matrix.markdown(cases))
        else:
            lines += _markdown_rows(cases)
        mean = _group_line(group, len(cases))
        lines += ["", mean] if mean else []
    return "\n".join(lines)


def plain(result: Mapping[str, Any]) -> str:
    """The same for a terminal without rich: padded columns."""
    lines = []
    for group, cases in _groups(result):
        body = [HEADER, *rows(cases)]
        columns = _used(cases, body[1:])
        widths = {at: max(len(row[at]) for row in body) for at in columns}
        lines += [group["title"]]
        for row in body:
            cells = [
                row[at].ljust(widths[at]) if HEADER[at] in ("case", "target", "verdict")
                else row[at].rjust(widths[at])
                for at in columns
            ]  # fmt: skip
            lines.append("  " + "  ".join(cells).rstrip())
        mean = _group_line(group, len(cases))
        lines += [f"  {mean}", ""] if mean else [""]
    return "\n".join([*lines, summary(result), *footer(result)])


COLOURS = {"met": "green", "noise": "yellow", "unknown": "yellow"}


def show(result: Mapping[str, Any]) -> None:
    """Print it: through rich where it is installed and the output is a terminal."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(result))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        print(plain(result))
        return
    for group, cases in _groups(result):
        body = rows(cases)
        columns = _used(cases, body)
        shown = Table(box=None, header_style="bold", title=group["title"], title_justify="left")
        for at in columns:
            words = HEADER[at] in ("case", "target", "verdict")
            shown.add_column(
                HEADER[at], justify="left" if words else "right", no_wrap=HEADER[at] == "case"
            )
        for row, case in zip(body, cases, strict=True):
            colour = COLOURS.get(case["verdict"], "red")
            cells = [row[at] for at in columns]
            shown.add_row(*cells[:-1], f"[{colour}]{cells[-1]}[/]")
        console.print(shown)
        console.print(_group_line(group, len(cases)))
    console.print(summary(result), style="bold")
    for line in footer(result):
        console.print(line, style="dim")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m benchmarks.table``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file written by python -m benchmarks")
    parser.add_argument("--plain", action="store_true", help="padded columns, not Markdown")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help="cases whose name holds PATTERN or matches it as a wildcard; may be repeated",
    )
    parser.add_argument(
        "--group", metavar="NAME", action="append", help="cases of this group; may be repeated"
    )
    options = parser.parse_args(arguments)
    result = chosen(load(options.result), options.only, options.group)
    if not result["cases"]:
        print("no case of the result matches", file=sys.stderr)
        return 2
    print(plain(result) if options.plain else markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
