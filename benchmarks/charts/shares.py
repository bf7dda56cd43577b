"""How much of the memory's bandwidth permuted copies reach: a dot for each dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import style

__all__ = ["figure"]

GROUPS = ("permutes", "permutes with a cast")
SHADES = ("#2f6fb5", "#e07b1a", "#3d8b57", "#8250a8", "#8a6d3b", "#c2407a")
HEIGHT = 0.26


def _split(name: str) -> tuple[str, str]:
    """The layout and the dtype of ``permute LAYOUT DTYPE``."""
    layout, _, dtype = name.removeprefix("permute ").rpartition(" ")
    return layout, dtype


def figure(result: Mapping[str, Any]) -> Any:
    """One bar for each case, together by layout; None if no case has a share."""
    import matplotlib.pyplot as plt

    rows = [row for row in result["cases"] if row["group"] in GROUPS and row["share_of_limit"]]
    if not rows:
        return None
    layouts: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for row in rows:
        layout, dtype = _split(row["name"])
        layouts.setdefault((row["group"], layout), []).append((dtype, row))
    dtypes = list(dict.fromkeys(dtype for members in layouts.values() for dtype, _ in members))
    colours = {dtype: SHADES[number % len(SHADES)] for number, dtype in enumerate(dtypes)}

    height = (len(rows) * 0.75 + len(layouts) * 0.6) * HEIGHT + 1.5
    drawn, axes = plt.subplots(figsize=(9.6, height))
    most = max(1.0, *(row["share_of_limit"]["value"] for row in rows)) + 0.15
    at, places, labels = 0.0, [], []
    for (group, layout), members in layouts.items():
        first = at
        for dtype, row in members:
            share = row["share_of_limit"]
            axes.barh(at, share["value"], height=0.62, color=colours[dtype], linewidth=0)
            axes.plot([share["q1"], share["q3"]], [at, at], color=style.INK, linewidth=0.8)
            for target in row["targets"]:
                if target.get("what") == "limit":
                    mark = target["at_least"]
                    axes.plot([mark] * 2, [at - 0.36, at + 0.36], color=style.INK, linewidth=1.8)
            missed = row["verdict"] in ("missed", "error")
            axes.annotate(
                f"{share['value']:.2f}", (min(max(share["value"], share["q3"]), most - 0.07), at), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=7.5,
                color=style.LOSS if missed else style.INK,
                weight="bold" if missed else "normal",
            )  # fmt: skip
            at += 0.75
        places.append((first + at - 0.75) / 2)
        labels.append(layout if group == GROUPS[0] else f"{layout}, cast")
        at += 0.6
    axes.axvline(1, color=style.INK, linestyle=(0, (5, 3)), linewidth=1.1)
    axes.set_yticks(places, labels, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at - 0.5, -0.7)
    axes.set_xlim(0, most)
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[dtype]) for dtype in dtypes]
    drawn.legend(
        handles, dtypes, loc="upper left", bbox_to_anchor=(0.005, 1 - 0.3 / height),
        ncols=6, fontsize=8, columnspacing=1.2, handlelength=1.2,
    )  # fmt: skip
    style.frame(
        drawn,
        result["machine"],
        "Permuted copies: share of the plain C copy's bandwidth; a mark is the target, red misses it",
        above=0.4,
    )
    return drawn
