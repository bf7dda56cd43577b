"""Command line: ``python -m benchmarks.charts RESULT.json OUTDIR [--png]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.charts import draw
from benchmarks.table import load


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every chart for which the result has cases."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.charts", description="Draws the charts of a result."
    )
    parser.add_argument("result", type=Path, help="JSON file written by python -m benchmarks")
    parser.add_argument("folder", metavar="OUTDIR", type=Path, help="where the charts go")
    parser.add_argument("--png", action="store_true", help="PNG instead of SVG, to look at")
    options = parser.parse_args(arguments)
    for path in draw(load(options.result), options.folder, kind="png" if options.png else "svg"):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
