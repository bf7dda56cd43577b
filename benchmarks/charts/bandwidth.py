"""Bandwidth against size, for contiguous copies and fills."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import text

from . import style

__all__ = ["figure"]

PANELS = (("contiguous copies", "copy"), ("contiguous fills", "fill"))
TICKS = [256 * 16**power for power in range(6)]  # 256 B to 256 MiB
LIBC = {"copy": "memcpy", "fill": "memset"}


def _written(row: Mapping[str, Any], what: str) -> int:
    return int(row["bytes"]) // (2 if what == "copy" else 1)


def _panel(axes: Any, rows: list[Mapping[str, Any]], what: str, limit: float | None) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    sizes = [_written(row, what) for row in rows]
    for name, label in (("libc", f"libc {LIBC[what]}"), ("torch", "torch"), ("paramkit",) * 2):
        points = [
            (at, row["bytes"], side)
            for at, row in zip(sizes, rows, strict=True)
            if (side := row["sides"].get(name))
        ]
        if not points:
            continue
        x = [at for at, _, _ in points]
        low = [moved / side["q3_ns"] for _, moved, side in points]
        high = [moved / side["q1_ns"] for _, moved, side in points]
        colour = style.COLOURS[name]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            x,
            [side["gbs"] for _, _, side in points],
            color=colour,
            label=label,
            linewidth=2.2 if name == "paramkit" else 1.5,
            marker="o",
            markersize=4 if name == "paramkit" else 3,
        )
    if limit:
        axes.axhline(
            limit,
            color=style.COLOURS["limit"],
            linestyle=(0, (5, 3)),
            linewidth=1.1,
            label=f"limit of memory, {limit:.0f}",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.size(value)))
    axes.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(True)
    moved = "read + written" if what == "copy" else "written"
    axes.set_title(f"Contiguous {what}, GB/s {moved}")
    axes.set_xlabel("size of the tensor")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    axes.legend(loc="best", fontsize=8.5)


def figure(result: Mapping[str, Any]) -> Any:
    """Two panels, copies and fills; None if neither was measured."""
    import matplotlib.pyplot as plt

    panels = [
        (what, rows)
        for group, what in PANELS
        if (rows := [row for row in result["cases"] if row["group"] == group and row["sides"]])
    ]
    if not panels:
        return None
    drawn, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.0), squeeze=False)
    for each, (what, rows) in zip(axes[0], panels, strict=True):
        limit = result["limits"].get(what)
        _panel(each, rows, what, limit["gbs"] if limit else None)
    style.frame(drawn, result["machine"])
    return drawn
