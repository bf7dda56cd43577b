"""Where streaming stores begin to win: the measurement behind the kernels' threshold.

``python -m benchmarks.streaming [--json OUT]`` runs copies, fills and copies of rows of 64 KiB to
512 MiB, each with streaming forced on and forced off in turns, and torch's beside. It prints a table and
for each kind the smallest size from which streaming is faster and stays so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, text
from benchmarks.rounds import Budget, interleaved
from benchmarks.sides import Side
from tests import cases as inputs

__all__ = ["KINDS", "SIZES", "crossover", "main", "measure", "table"]

KIB = 1024
MIB = 1024 * KIB
SIZES = tuple(64 * KIB << power for power in range(14))  # to 512 MiB written

ALWAYS, NEVER = 1, 1 << 62
"""Thresholds in bytes: every call streams; none does."""

FULL = Budget(seconds=1.5, least=8, most=400)
QUICK = Budget(seconds=0.2, least=4, most=40)

FASTER = 1.02
"""By so much streaming must win: less is noise."""


def _copy(size: int) -> tuple[Tensor, Tensor]:
    return inputs.contiguous(size // 4, torch.float32, inputs.tiled)


def _fill(size: int) -> tuple[Tensor, None]:
    return torch.zeros(size // 4), None


def _rows(size: int) -> tuple[Tensor, Tensor]:
    """Rows of 4 KiB, every other one of the destination."""
    return inputs.every_other_row(size // (4 * KIB), KIB, torch.float32, inputs.tiled)


KINDS: dict[str, Callable[[int], tuple[Tensor, Tensor | None]]] = {
    "copy": _copy,
    "fill": _fill,
    "rows": _rows,
}


def _forced(setter: Callable[[int], int], threshold: int, call: Callable[[], object]) -> Side:
    def run(times: int) -> None:
        before = setter(threshold)
        try:
            for _ in range(times):
                call()
        finally:
            setter(before)

    return Side("", run, 1, batched=True)


def _setter() -> Callable[[int], int] | None:
    """The extension's switch: sets the threshold, returns the one before; -1 is the default."""
    import paramkit

    with paramkit.backend.force("cpu") as extension:
        return getattr(extension, "set_stream_bytes", None)


def _calls(dst: Tensor, src: Tensor | None) -> tuple[Callable[[], object], Callable[[], object]]:
    import paramkit

    if src is None:
        return lambda: paramkit.fill_(dst, 0.5), lambda: dst.fill_(0.5)
    return lambda: paramkit.copy_(dst, src), lambda: dst.copy_(src)


def measure(
    setter: Callable[[int], int], kind: str, size: int, budget: Budget = FULL
) -> dict[str, Any]:
    """One size of one kind: GB/s of the three sides, and streaming's gain with its quartiles."""
    dst, src = KINDS[kind](size)
    ours, torchs = _calls(dst, src)
    moved = size * (1 if src is None else 2)
    inner = max(1, min(50, 8 * MIB // size))
    sides = {
        "streaming": _forced(setter, ALWAYS, ours),
        "ordinary": _forced(setter, NEVER, ours),
        "torch": Side("torch", torchs, moved, inner),
    }
    sides = {
        name: Side(name, side.call, moved, inner, side.batched) for name, side in sides.items()
    }
    samples = interleaved(sides, budget)
    gains = [
        slow / fast for fast, slow in zip(samples["streaming"], samples["ordinary"], strict=True)
    ]
    q1, gain, q3 = statistics.quantiles(gains, n=4, method="inclusive")
    row: dict[str, Any] = {"kind": kind, "bytes": size, "gain": gain, "gain_q1": q1, "gain_q3": q3}
    for name, times in samples.items():
        row[f"{name}_gbs"] = round(moved / statistics.median(times), 3)
    return row


def crossover(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The smallest size from which on streaming wins at every larger one; None if at none."""
    found = None
    for row in sorted(rows, key=lambda row: row["bytes"], reverse=True):
        if row["gain"] < FASTER:
            break
        found = row["bytes"]
    return found


def table(result: Mapping[str, Any]) -> str:
    """Padded columns and the crossover of each kind."""
    lines = [f"{'':5}{'bytes':>9}{'streaming':>11}{'ordinary':>10}{'torch':>8}  gain [q1, q3]"]
    for row in result["rows"]:
        rates = [row[f"{name}_gbs"] for name in ("streaming", "ordinary", "torch")]
        lines.append(
            f"{row['kind']:5}{text.size(row['bytes']):>9}{rates[0]:>11.1f}{rates[1]:>10.1f}"
            f"{rates[2]:>8.1f}  {row['gain']:.2f} [{row['gain_q1']:.2f}, {row['gain_q3']:.2f}]"
        )
    lines.append("")
    for kind, size in result["crossover"].items():
        where = f"from {text.size(size)} written on" if size else "at no size"
        lines.append(f"{kind}: streaming wins {where}")
    return "\n".join([*lines, text.caption(result["machine"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m benchmarks.streaming``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--kind", choices=tuple(KINDS), action="append", help="one kind only")
    parser.add_argument("--most", type=int, default=SIZES[-1], help="the largest size in bytes")
    options = parser.parse_args(arguments)
    setter = _setter()
    if setter is None:
        print("this extension cannot force streaming: no _C.set_stream_bytes", file=sys.stderr)
        return 2
    rows = []
    with torch.no_grad():
        for kind in options.kind or KINDS:
            for size in SIZES:
                if size <= options.most:
                    rows.append(measure(setter, kind, size, QUICK if options.quick else FULL))
    kinds = dict.fromkeys(row["kind"] for row in rows)
    result = {
        "machine": machine.describe(),
        "quick": options.quick,
        "rows": rows,
        "crossover": {
            kind: crossover([row for row in rows if row["kind"] == kind]) for kind in kinds
        },
    }
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
