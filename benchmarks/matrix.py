"""The conversions as a matrix: a row for each source dtype, a column for each destination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import text
from benchmarks.targets import geometric_mean

__all__ = ["classes", "headings", "markdown", "rows"]

_SHORT = {"float": "f", "uint": "u", "int": "i"}


def _short(dtype: str) -> str:
    """``f32``, ``bf16``, ``e4m3fn``, ``u8``."""
    if dtype.startswith("float8_"):
        return dtype.removeprefix("float8_")
    if dtype == "bfloat16":
        return "bf16"
    for name, letter in _SHORT.items():
        if dtype.startswith(name) and dtype.removeprefix(name).isdecimal():
            return letter + dtype.removeprefix(name)
    return dtype


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    source, _, destination = row["name"].removeprefix("cast ").partition("->")
    return source, destination


def headings(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dtypes of both sides, in the order in which they were measured."""
    found: dict[str, None] = {}
    for row in results:
        found.setdefault(_key(row)[0])
    for row in results:
        found.setdefault(_key(row)[1])
    return list(found)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["ratio"]:
        return f"**{row['verdict']}**"
    value = row["ratio"]["value"]
    shown = f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
    if row["verdict"] in ("missed", "error"):
        return f"**{shown}** ✗"
    return f"{shown} ~" if row["verdict"] == "noise" else shown


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells with ratios; a miss is bold with a cross, noise has a tilde."""
    by_pair = {_key(row): row for row in results}
    names = headings(results)
    return [
        [_short(source), *(_cell(by_pair.get((source, to))) for to in names)]
        for source in names
        if any((source, to) in by_pair for to in names)
    ]


def classes(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each class of pairs: how many, how many met, the least, mean and greatest ratio."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        if row["ratio"]:
            found.setdefault(row.get("facts", {}).get("class", "casts"), []).append(row)
    made = []
    for name, group in sorted(found.items()):
        ratios = [row["ratio"]["value"] for row in group]
        made.append(
            {
                "class": name,
                "pairs": len(group),
                "met": sum(row["verdict"] == "met" for row in group),
                "below": sum(value < 1 for value in ratios),
                "least": min(ratios),
                "mean": geometric_mean(ratios),
                "greatest": max(ratios),
                "wanted": group[0]["wanted"],
            }
        )
    return made


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The matrix, a table of the classes, and every pair that missed with its reason."""
    names = [_short(name) for name in headings(results)]
    lines = ["Torch's time divided by paramkit's; source dtypes down, destinations across.", ""]
    lines += ["| from \\ to | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    lines += ["", "| pairs | count | met | below 1x | least | mean | greatest | target |"]
    lines += ["|---|" + "---:|" * 6 + "---|"]
    for each in classes(results):
        ratios = " | ".join(text.ratio(each[key]) for key in ("least", "mean", "greatest"))
        lines.append(
            f"| {each['class']} | {each['pairs']} | {each['met']} | {each['below']} | {ratios} "
            f"| {each['wanted']} |"
        )
    missed = [row for row in results if row["verdict"] != "met"]
    if missed:
        lines += ["", f"Not met ({len(missed)}; ✗ missed, ~ noise):", ""]
        lines += [
            f"- {row['name'].removeprefix('cast ')}: {row['verdict']}: {row['detail']}"
            for row in missed
        ]
    return "\n".join(lines)
