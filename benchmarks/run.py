"""A whole run: chosen cases in order, the limits, the groups; as plain data for JSON."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks import machine, plain
from benchmarks.cases import CASES, GROUPS, Case
from benchmarks.limits import SIZE, Limits
from benchmarks.measure import Outcome, run_case
from benchmarks.table import SCHEMA
from benchmarks.targets import judge_group

__all__ = ["run"]


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _groups(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    found = []
    for group in GROUPS.values():
        members = [outcome for outcome in outcomes if outcome.case.group == group.name]
        if not members:
            continue
        figures = [figure for outcome in members if (figure := outcome.figures.get("ratio"))]
        # A case in error has no ratio, and the mean of the others is not the group's.
        complete = len(figures) == sum(case.group == group.name for case in CASES)
        mean, verdict = judge_group(group.mean, figures, complete)
        found.append(
            {
                "name": group.name,
                "title": group.title,
                "mean": mean and mean.as_dict(),
                "target": group.mean,
                "verdict": verdict.word if group.mean else "",
                "detail": verdict.detail if group.mean else "",
                "counts": dict(Counter(outcome.verdict.word for outcome in members)),
            }
        )
    return found


def run(
    cases: Sequence[Case], quick: bool = False, tiny: bool = False, limits: Limits | None = None
) -> dict[str, Any]:
    """Measure `cases`; the result as it is written to JSON."""
    limits = limits or Limits(64 * 1024 if tiny else SIZE)
    facts = machine.describe()
    outcomes = []
    for number, case in enumerate(cases, 1):
        _progress(f"[{number}/{len(cases)}] {case.name}")
        outcomes.append(run_case(case, quick, tiny, limits))
    _progress("")
    if plain.available():
        for what in {"copy", "fill"} - limits.measured():
            limits.measure(what)
    rows = [outcome.with_limit(limits.gbs(outcome.case.limit)).as_dict() for outcome in outcomes]
    return {
        "schema": SCHEMA,
        "machine": facts,
        "quick": quick,
        "limits": limits.as_dict(),
        "groups": _groups(outcomes),
        "cases": rows,
    }
