"""Colours, type and how a figure is saved: the same for all charts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "GRID", "INK", "LOSS", "MUTED", "WIN", "applied", "frame", "save"]

INK, MUTED, GRID = "#1f2328", "#59636e", "#d8dee4"
WIN, LOSS = "#2f6fb5", "#d1242f"
COLOURS = {
    "paramkit": "#2f6fb5",
    "torch": "#e07b1a",
    "numpy": "#6b8e23",
    "libc": "#8250a8",
    "limit": "#1f2328",
}

_SETTINGS: dict[Any, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "paramkit",
}


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """The settings, without a display and whatever the user's own are."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def save(figure: Any, target: Path) -> None:
    """Write and close it; an SVG has no date, and names other fonts in case one is missing."""
    import matplotlib.pyplot as plt

    svg = target.suffix == ".svg"
    figure.savefig(target, dpi=110, metadata={"Date": None} if svg else None)
    plt.close(figure)
    if svg:
        drawn = target.read_text(encoding="utf-8")
        drawn = drawn.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, Helvetica, sans-serif")
        lines = (line.rstrip() for line in drawn.splitlines())
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def frame(figure: Any, machine: Mapping[str, Any], title: str = "", above: float = 0.0) -> None:
    """A title at the top left, and in small print below where the figures come from.

    Args:
        above: inches at the top that the axes leave free.
    """
    height = figure.get_figheight()
    if title:
        figure.suptitle(
            title, x=0.012, y=1 - 0.1 / height, ha="left", va="top", weight="bold", fontsize=10.5
        )
    figure.text(
        0.012,
        0.06 / height,
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"paramkit {machine['commit']} ({machine['capability']}), {machine['date']}",
        fontsize=7.5,
        color=MUTED,
        va="bottom",
    )
    figure.tight_layout(rect=(0, 0.25 / height, 1, 1 - above / height))
