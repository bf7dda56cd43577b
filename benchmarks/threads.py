"""Whether plans of several Python threads are as fast together as one after the other.

``python -m benchmarks.threads [--json OUT] [--quick]``: each of 1, 2, 4 and 8 threads replays a plan of a model of its
own. Beside that, in turns, one thread that replays the same plans one by one, and torch's `_foreach_copy_` both ways.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, text
from benchmarks.rounds import Budget, interleaved
from benchmarks.sides import Side
from tests import cases as inputs

__all__ = ["SIZES", "THREADS", "Crew", "main", "measure", "table"]

THREADS = (1, 2, 4, 8)
# Tensors and elements of each: the GIL is kept, kept by two threads of OpenMP, given up.
SIZES = {"100 x 64": (100, 64), "100 x 2048": (100, 2048), "16 x 1 MiB": (16, 1 << 18)}

FULL = Budget(seconds=3.0, least=9, most=300)
QUICK = Budget(seconds=0.3, least=4, most=20)

ENOUGH = 0.9
"""Threads together must keep this part of the throughput of one."""


class Crew:
    """Threads that each make one call, again and again, all at once.

    >>> crew = Crew([lambda: None] * 2)
    >>> crew(times=3)
    >>> crew.end()
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._start = threading.Barrier(len(calls) + 1)
        self._stop = threading.Barrier(len(calls) + 1)
        self._times: int | None = 0
        self._threads = [threading.Thread(target=self._work, args=(call,)) for call in calls]
        for thread in self._threads:
            thread.start()

    def _work(self, call: Callable[[], object]) -> None:
        while True:
            self._start.wait()
            if self._times is None:
                return
            for _ in range(self._times):
                call()
            self._stop.wait()

    def __call__(self, times: int) -> None:
        """Each call so many times."""
        self._times = times
        self._start.wait()
        self._stop.wait()

    def end(self) -> None:
        self._times = None
        self._start.wait()
        for thread in self._threads:
            thread.join()


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times):
            for call in calls:
                call()

    return run


def _models(count: int, size: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    tensors, numel = SIZES[size]
    return [inputs.small_tensors(tensors, numel) for _ in range(count)]


def measure(count: int, size: str, budget: Budget = FULL) -> dict[str, Any]:
    """GB/s of `count` threads and of one, ours and torch's; `kept`: threads beside one, with its quartiles."""
    import paramkit

    models = _models(count, size)
    moved = sum(t.numel() * t.element_size() for dsts, srcs in models for t in (*dsts, *srcs))
    plans = [paramkit.plan(dsts, srcs).apply for dsts, srcs in models]

    def copy(dsts: list[Tensor], srcs: list[Tensor]) -> Callable[[], object]:
        return lambda: torch._foreach_copy_(dsts, srcs)

    copies = [copy(dsts, srcs) for dsts, srcs in models]
    ours, torchs = Crew(plans), Crew(copies)
    calls = {
        "threads": ours,
        "one": _in_turn(plans),
        "torch threads": torchs,
        "torch one": _in_turn(copies),
    }
    # About 0.1 s a sample: to wake the threads and to wait for them takes 0.1 ms, in which none is at work.
    inner = max(1, (1 << 30) // moved)
    try:
        sides = {name: Side(name, call, moved, inner, batched=True) for name, call in calls.items()}
        samples = interleaved(sides, budget)
    finally:
        ours.end()
        torchs.end()
    for dsts, srcs in models:
        assert all(map(torch.equal, dsts, srcs))
    shares = [one / all_ for all_, one in zip(samples["threads"], samples["one"], strict=True)]
    q1, kept, q3 = statistics.quantiles(shares, n=4, method="inclusive")
    row: dict[str, Any] = {"size": size, "count": count, "kept": kept, "q1": q1, "q3": q3}
    for name, times in samples.items():
        row[name] = round(moved / statistics.median(times), 3)
    return row


def table(result: Mapping[str, Any]) -> str:
    """Padded columns, and what did not keep its throughput."""
    names = ("threads", "one", "torch threads", "torch one")
    lines = [f"{'GB/s':12}{'threads':>8}" + "".join(f"{n:>15}" for n in names) + "  kept [q1, q3]"]
    lines[0] = lines[0].replace(f"{'threads':>15}", f"{'together':>15}", 1)
    for row in result["rows"]:
        rates = "".join(f"{row[name]:>15.1f}" for name in names)
        lines.append(
            f"{row['size']:12}{row['count']:>8}{rates}  {row['kept']:.2f} [{row['q1']:.2f}, {row['q3']:.2f}]"
        )
    slow = [f"{r['size']} with {r['count']}" for r in result["rows"] if r["q3"] < ENOUGH]
    lines += ["", f"less than {ENOUGH} kept: {', '.join(slow) or 'none'}"]
    return "\n".join([*lines, text.caption(result["machine"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m benchmarks.threads``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--size", choices=tuple(SIZES), action="append", help="one size only")
    options = parser.parse_args(arguments)
    budget = QUICK if options.quick else FULL
    rows = [measure(n, size, budget) for size in options.size or SIZES for n in THREADS]
    result = {"machine": machine.describe(), "quick": options.quick, "rows": rows}
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
