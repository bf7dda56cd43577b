"""A whole run on a GPU: limits, chosen cases in order, limits again; as plain data for JSON."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import rounds
from benchmarks.table import SCHEMA
from benchmarks.targets import Verdict, judge_group

from .compiled import Compiler
from .device import Device
from .limits import Limits
from .measure import Measured, run_case, without_figures
from .registry import CASES, GROUPS, Case

__all__ = ["AROUND", "SECONDS", "budget_of", "run"]

SECONDS = 230.0
"""For a full run; a quick one has a quarter."""

QUICK_SECONDS = 55.0

AROUND = 1.0
"""Seconds that a case takes for its inputs and its check, roughly."""

COMPILING = 40.0
"""Seconds for torch.compile in all cases together."""

MOST = 60
"""Rounds of a case at most."""


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def budget_of(case: Case, left: float, to_come: Sequence[Case], quick: bool) -> rounds.Budget:
    """The rounds of a case when so many seconds are left for it and those `to_come`.

    Every case gets the seconds it asks for, a quarter of them in a quick run, or the same part of
    them where they do not all fit.
    """
    asked = sum(each.seconds for each in (case, *to_come))
    part = max(0.0, left - AROUND * (1 + len(to_come))) / asked
    seconds = case.seconds * min(0.25 if quick else 1.0, part)
    return rounds.Budget(seconds, min(case.least, 4) if quick else case.least, MOST)


def _groups(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    found = []
    for group in GROUPS.values():
        members = [each.outcome for each in measured if each.outcome.case.group == group.name]
        if not members:
            continue
        figures = [figure for outcome in members if (figure := outcome.figures.get("ratio"))]
        complete = len(figures) == sum(case.group == group.name for case in CASES)
        mean, _ = judge_group(None, figures, complete)
        found.append(
            {
                "name": group.name,
                "title": group.title,
                "mean": mean and mean.as_dict(),
                "target": None,
                "verdict": "",
                "detail": "",
                "counts": dict(Counter(outcome.verdict.word for outcome in members)),
            }
        )
    return found


def run(
    cases: Sequence[Case],
    gpu: Device,
    facts: dict[str, object],
    *,
    quick: bool = False,
    tiny: bool = False,
    seconds: float | None = None,
    save: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Measure `cases`; the result as it is written to JSON.

    Args:
        facts: of the machine.
        quick: small budgets, no torch.compile.
        tiny: tiny inputs: what the tests run; its times mean nothing.
        seconds: for all of it. What does not fit is left out, and says so.
        save: is given the result so far after every case, so that little is lost if a run is ended.
    """
    limits = Limits(gpu, (64 * 1024,)) if tiny else Limits(gpu)
    kinds = list(dict.fromkeys(case.limit for case in cases if case.limit))
    compiler = None if quick or tiny else Compiler(gpu, COMPILING)
    seconds = seconds or (QUICK_SECONDS if quick else SECONDS)
    end = gpu.now() + seconds * 1e9
    measured: list[Measured] = []

    def result() -> dict[str, Any]:
        judged = [each.judged(limits) for each in measured]
        return {
            "schema": SCHEMA,
            "machine": facts,
            "quick": quick,
            "limits": limits.as_dict(),
            "groups": _groups(judged),
            "cases": [each.as_dict() for each in judged],
        }

    for kind in kinds:
        _progress(f"the limit of {kind.replace('_', ' ')}")
        limits.measure(kind)
    for number, case in enumerate(cases):
        left = (end - gpu.now()) / 1e9
        _progress(f"[{number + 1}/{len(cases)}] {case.name} ({max(0, left):.0f} s left)")
        if left <= 0:
            measured.append(without_figures(case, Verdict("unknown", "no time was left")))
            continue
        budget = rounds.TINY if tiny else budget_of(case, left, cases[number + 1 :], quick)
        measured.append(run_case(case, gpu, compiler, budget, tiny))
        error = measured[-1].outcome.verdict
        if error.word == "error":
            _progress(f"  {error}")
        save(result())
    with contextlib.suppress(RuntimeError):  # see run_case(): the cases say what happened
        for kind in kinds:
            limits.measure(kind)
    final = result()
    save(final)
    return final
