"""Two results beside each other: has a case become faster, or slower, or is it noise?

Raw times of two runs say little: a machine is not equally fast twice. So ratios to torch are
compared, which was timed in the same rounds. A case is `faster` or `slower` only if the quartiles
of its two ratios do not overlap, and the medians differ by more than `LEAST`; else it is the `same`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import text

__all__ = ["LEAST", "Change", "changes", "table", "verdict"]

LEAST = 0.05
"""The part by which a ratio must differ; less is what two runs of the same code differ by."""


@dataclass(frozen=True)
class Change:
    """One case in both results; `old` or `new` is None where it is missing or has no figure."""

    name: str
    old: Mapping[str, float] | None
    new: Mapping[str, float] | None
    verdict: str

    @property
    def factor(self) -> float | None:
        return self.new["value"] / self.old["value"] if self.old and self.new else None


def verdict(old: Mapping[str, float], new: Mapping[str, float]) -> str:
    """``faster``, ``slower`` or ``same``, from two ratios with quartiles."""
    factor = new["value"] / old["value"]
    if new["q1"] > old["q3"] and factor > 1 + LEAST:
        return "faster"
    if new["q3"] < old["q1"] and factor < 1 / (1 + LEAST):
        return "slower"
    return "same"


def _memory(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = (row["temporary_bytes"]["paramkit"] for row in (old, new))
    return "same" if before == after else "more memory" if after > before else "less memory"


def changes(base: Mapping[str, Any], result: Mapping[str, Any]) -> list[Change]:
    """Every case of either result; those of one alone are `gone` or `new`."""
    old = {row["name"]: row for row in base["cases"]}
    new = {row["name"]: row for row in result["cases"]}
    found = []
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        ratios = [row["ratio"] if row else None for row in (before, after)]
        if before is None or after is None:
            word = "new" if before is None else "gone"
        elif before.get("temporary_bytes") and after.get("temporary_bytes"):
            word = _memory(before, after)
        elif not ratios[0] or not ratios[1]:
            broken = "error" in (before["verdict"], after["verdict"])
            word = "error" if broken else "no ratio"
        else:
            word = verdict(ratios[0], ratios[1])
        found.append(Change(name, ratios[0], ratios[1], word))
    return found


def worse(found: Sequence[Change]) -> bool:
    """Whether anything is slower, needs more memory, or stopped working."""
    return any(change.verdict in ("slower", "more memory", "error") for change in found)


def _ratio(figure: Mapping[str, float] | None) -> str:
    if not figure:
        return "-"
    return f"{text.ratio(figure['value'])} [{figure['q1']:.3g}, {figure['q3']:.3g}]"


def table(base: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Padded columns: old and new ratio with quartiles, the change, the verdict."""
    found = changes(base, result)
    body = [("case", "old ratio", "new ratio", "new / old", "")]
    for change in found:
        factor = f"{change.factor:.2f}" if change.factor else "-"
        body.append((change.name, _ratio(change.old), _ratio(change.new), factor, change.verdict))
    widths = [max(len(row[column]) for row in body) for column in range(4)]
    lines = []
    for row in body:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:4], widths[1:], strict=True)]
        lines.append("  ".join([*cells, row[4]]).rstrip())
    counts = Counter(change.verdict for change in found)
    lines += ["", ", ".join(f"{count} {word}" for word, count in counts.most_common()) + "."]
    for title, machine in (("old", base["machine"]), ("new", result["machine"])):
        lines.append(f"{title}: {text.caption(machine)}")
    if base["quick"] != result["quick"]:
        lines.append("One of the two is a quick run; its quartiles come from few rounds.")
    return "\n".join(lines)
