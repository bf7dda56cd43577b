"""Ratios to torch as bars from 1x: to the right where paramkit is faster, to the left where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import matrix, text

from . import style

__all__ = ["Bar", "bars", "figure"]

ROW = 0.19  # inches
WIDTH, PLOT = 9.6, 5.4  # inches of the figure, and about as many of it for the bars
FIGURE = 0.42  # inches that a printed ratio needs
SLOWEST = 20  # so many conversions slower than torch have bars of their own


@dataclass(frozen=True)
class Bar:
    """One bar: a ratio with its spread, and the ratio that is promised (0: none)."""

    label: str
    value: float
    low: float
    high: float
    target: float


def _target(row: Mapping[str, Any]) -> float:
    """The greatest ratio that the case's targets name."""
    flat = [part for target in row["targets"] for part in target.get("either", [target])]
    return max((part["at_least"] for part in flat if part["what"] == "ratio"), default=0.0)


def _of(row: Mapping[str, Any], drop: str = "") -> Bar:
    figure = row["ratio"]
    name = row["name"].removeprefix(drop)
    return Bar(name, figure["value"], figure["q1"], figure["q3"], _target(row))


def _casts(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """A bar for each class, and one for each pair that torch does faster."""
    found = []
    for each in matrix.classes(rows):
        members = [row for row in rows if row.get("facts", {}).get("class") == each["class"]]
        label = f"{each['class']}: {each['pairs']} pairs, mean, least to greatest"
        target = _target(members[0]) if members else 0.0
        found.append(Bar(label, each["mean"], each["least"], each["greatest"], target))
    found.sort(key=lambda bar: -bar.value)
    slower = [_of(row, "cast ") for row in rows if row["ratio"]["value"] < 1]
    slower.sort(key=lambda bar: bar.value)
    if len(slower) > SLOWEST:
        last = slower[SLOWEST]
        rest = f"and {len(slower) - SLOWEST} more pairs, from"
        slower[SLOWEST:] = [Bar(rest, last.value, last.low, last.high, 0.0)]
    return found + slower


def _shown(value: float) -> str:
    """A loss never reads as 1.00x."""
    shown = text.ratio(value)
    return f"{value:.4f}x" if value < 1 and shown == "1.00x" else shown


def bars(result: Mapping[str, Any]) -> list[tuple[str, list[Bar]]]:
    """The groups with their bars, the best first."""
    found = []
    for group in result["groups"]:
        rows = [row for row in result["cases"] if row["group"] == group["name"] and row["ratio"]]
        if not rows:
            continue
        if group["name"] == "casts" and len(rows) > 12:
            made = _casts(rows)
        else:
            made = sorted((_of(row) for row in rows), key=lambda bar: -bar.value)
        found.append((group["title"], made))
    return found


def figure(result: Mapping[str, Any]) -> Any:
    """All groups below each other; None if there is no ratio."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    groups = bars(result)
    if not groups:
        return None
    lines = sum(len(made) + 1.6 for _, made in groups)
    height = lines * ROW + 1.25
    drawn, axes = plt.subplots(figsize=(WIDTH, height))
    every = [bar for _, made in groups for bar in made]
    least = min(0.6, *(bar.low for bar in every))
    most = max(4.0, *(max(bar.high, bar.target) for bar in every))
    # What a printed ratio takes on the logarithmic axis, as a factor; room for one at both ends.
    room = (most / least) ** (FIGURE / (PLOT - 2 * FIGURE))
    least, most = least / room, most * room

    at, places, labels = 0.0, [], []
    for title, made in groups:
        axes.text(
            -0.005, at, title, transform=axes.get_yaxis_transform(), ha="right", va="center",
            weight="bold", fontsize=9,
        )  # fmt: skip
        at += 1
        for bar in made:
            wins = bar.value >= 1
            axes.barh(
                at, bar.value - 1, left=1, height=0.72, color=style.WIN if wins else style.LOSS,
                linewidth=0,
            )  # fmt: skip
            axes.plot([bar.low, bar.high], [at, at], color=style.INK, linewidth=0.8)
            edge = max(bar.value, bar.high) if wins else min(bar.value, bar.low)
            if bar.target > 1:  # a guard near 1x is the line at 1x
                axes.plot([bar.target] * 2, [at - 0.46, at + 0.46], color=style.INK, linewidth=1.8)
                if wins and edge < bar.target < edge * room:
                    edge = bar.target  # the number must not lie on the mark
            axes.annotate(
                _shown(bar.value), (edge, at), xytext=(4 if wins else -4, 0),
                textcoords="offset points", ha="left" if wins else "right", va="center",
                fontsize=7.5, color=style.INK if wins else style.LOSS,
                weight="normal" if wins else "bold",
            )  # fmt: skip
            places.append(at)
            labels.append(bar)
            at += 1
        at += 0.6
    axes.axvline(1, color=style.INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    axes.set_ylim(at - 0.2, -0.8)
    axes.set_yticks(places, [bar.label for bar in labels], fontsize=8)
    for label, bar in zip(axes.get_yticklabels(), labels, strict=True):
        label.set_color(style.INK if bar.value >= 1 else style.LOSS)
    axes.tick_params(axis="y", length=0)
    steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    axes.xaxis.set_major_locator(FixedLocator([step for step in steps if least <= step <= most]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.tick_params(axis="x", labeltop=True, labelbottom=True, top=False)
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)
    style.frame(
        drawn,
        result["machine"],
        "Times faster than torch (red: slower); a mark is the target, a thin line the spread",
        above=0.12,
    )
    return drawn
