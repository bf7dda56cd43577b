"""Measured cases as rows of a result, in the form of `benchmarks.run`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measure import Timing
from benchmarks.table import SCHEMA
from benchmarks.targets import Condition, Figure, Verdict, judge, wanted

from .ranks import RANKS
from .registry import GROUP, Case, figure
from .targets import TARGETS, Most

__all__ = ["lines", "result", "rows"]


def rows(case: Case, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for a case, and one for each further side of ours or torch's.

    Args:
        found: `rounds.Measured` as plain data, or {"error": text}.
    """
    if "error" in found:
        return [_row(case.name, case, {}, {}, case.targets, Verdict("error", found["error"]), 0)]
    samples, size = found["samples"], found["bytes"]
    figures: dict[str, Figure | None] = {k: figure(v) for k, v in found["figures"].items()}
    figures["ratio"] = _ratio(samples["paramkit"], samples["torch"])
    verdict = judge(case.targets, figures)
    own = {name: samples[name] for name in ("paramkit", "torch")}
    out = [_row(case.name, case, own, figures, case.targets, verdict, size)]
    for name in samples:
        side, _, which = name.partition(", ")
        if not which:
            continue
        pair = {**own, side: samples[name]}
        beside = {"ratio": _ratio(pair["paramkit"], pair["torch"])}
        out.append(_row(f"{case.name}: {which}", case, pair, beside, (), Verdict(""), size))
    return out


def _row(
    name: str,
    case: Case,
    samples: Mapping[str, list[float]],
    figures: Mapping[str, Figure | None],
    targets: Sequence[Condition],
    verdict: Verdict,
    size: int,
) -> dict[str, Any]:
    ratio = figures.get("ratio")
    # No bandwidth: every case moves its values several times, each side in its own way.
    return {
        "name": name,
        "group": GROUP,
        "what": case.what,
        "mode": "interleaved",
        "bytes": size,
        "sides": {k: Timing.of(v, 0).as_dict() for k, v in samples.items()},
        "ratio": ratio and ratio.as_dict(),
        "share_of_limit": None,
        "share_of_ceiling": None,
        "growth": None,
        "targets": [target.as_dict() for target in targets],
        "wanted": wanted(targets),
        "verdict": verdict.word,
        "detail": verdict.detail,
        "facts": {k: v.value for k, v in figures.items() if v is not None and k != "ratio"},
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """torch's time over ours; the quartiles are of the rounds' own ratios."""
    paired = [their / own for own, their in zip(ours, theirs, strict=True)]
    q1, _, q3 = statistics.quantiles(paired, n=4, method="inclusive")
    return Figure(statistics.median(theirs) / statistics.median(ours), q1, q3)


def result(found: Sequence[dict[str, Any]], facts: Mapping[str, Any], size: str) -> dict[str, Any]:
    """All rows, as they are written to JSON.

    Args:
        found: rows.
        facts: of the machine, before the run.
        size: of the cases.
    """
    return {
        "schema": SCHEMA,
        "machine": {**facts, "threads": 1, "processes": RANKS, "process_group": "gloo"},
        "quick": size != "full",
        "limits": {"why_not": "these cases are held to ratios"},
        "groups": [
            {
                "name": GROUP,
                "title": f"{RANKS} processes on gloo, the slowest one's time",
                "mean": None,
                "target": None,
                "verdict": "",
                "detail": "",
                "counts": dict(Counter(row["verdict"] for row in found if row["verdict"])),
            }
        ],
        "cases": list(found),
    }


def lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was measured beside times, one line a case."""
    units = {
        condition.what: condition
        for targets in TARGETS.values()
        for condition in targets
        if isinstance(condition, Most)
    }
    out = []
    for row in cases:
        said = []
        for name, value in row.get("facts", {}).items():
            unit = units.get(name)
            if unit is not None:
                said.append(f"{name} {unit.text(value)}")
            elif "seconds" in name:
                said.append(f"{name} {value:.3g}")
            else:
                said.append(f"{name} {value / (1 << 20):.4g} MiB")
        if said:
            out.append(f"{row['name']}: {'; '.join(said)} (the highest of all ranks)")
    return out
