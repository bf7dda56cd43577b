"""`python -m benchmarks.scale --json FILE`, then `--publish FILE`: the tables of docs/scale.md."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine

from .planning import LAYOUTS, planned
from .runs import PAGE, SHAPES, compared

BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"


def tables(result: dict[str, Any]) -> str:
    """Of a result, as Markdown."""
    mib = 1 << 20
    out = [
        "| case | sent, MiB | received, MiB | messages | staging, MiB | seconds | off |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["cases"]:
        p, m = row["predicted"], row["measured"]
        cells = [
            f"{p[k] / unit:.0f} / {m[k] / unit:.0f}"
            for k, unit in (
                ("sent", mib),
                ("received", mib),
                ("messages sent", 1),
                ("staging receiver", mib),
            )
        ]
        cells.append(f"{p['seconds']:.3f} / {m['seconds']:.3f}")
        out.append(
            f"| {row['name']} | {' | '.join(cells)} | {m['seconds'] / p['seconds'] - 1:+.0%} |"
        )
    out += [
        "",
        "Each cell is predicted / measured, of the busiest rank; float32 to bfloat16, medians.",
        "",
        "Planning needs no GPU and no partner: this is one rank's own part of it, for the real number of ranks, in one",
        "process.",
        "",
        "| model | ranks | writes | names and proof, s | trainer's routes, s | replica's routes, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for p in result["planning"]:
        out.append(
            f"| {p['name']} | {p['ranks']} | {p['writes']:,} | {p['resolve']:.1f} | {p['sender']:.1f} | "
            f"{p['receiver']:.1f} |"
        )
    facts = result["machine"]
    load = facts["load"] or 0
    busy = f" The machine was busy (load {load} before the run)." if load > 0.5 else ""
    out += [
        "",
        f"{facts['cpu']}, {facts['cores']} cores; torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date']}.{busy}",
    ]
    return "\n".join(out)


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    options.add_argument("--json", type=Path, help="write the result here")
    options.add_argument(
        "--publish", type=Path, help="of an earlier result: only put its tables in"
    )
    options.add_argument("--tensors", type=int, default=8, help="of 4096 x 4096 in a model")
    given = options.parse_args()
    if given.publish:
        result = json.loads(given.publish.read_text("utf-8"))
        text = PAGE.read_text("utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        PAGE.write_text(f"{head}{BEGIN}\n{tables(result)}\n{END}{tail}", "utf-8")
        return 0
    result = {
        "machine": machine.describe(),
        "cases": [compared(name, given.tensors) for name in SHAPES],
        "planning": [planned(name) for name in LAYOUTS],
    }
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
