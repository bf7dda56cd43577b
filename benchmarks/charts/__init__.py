"""Charts from a result: ``python -m benchmarks.charts RESULT.json OUTDIR``.

They are drawn from the JSON alone and are the same bytes each time: no date, fixed identifiers, text
as text. The background is solid, so that they read the same in light and dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import bandwidth, ratios, shares

__all__ = ["CHARTS", "draw"]

CHARTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "bandwidth": bandwidth.figure,
    "ratios": ratios.figure,
    "limit-shares": shares.figure,
}


def draw(
    result: Mapping[str, Any],
    folder: Path,
    names: Sequence[str] = tuple(CHARTS),
    kind: str = "svg",
    prefix: str = "",
) -> list[Path]:
    """Draw the charts for which the result has cases; returns the files written."""
    from . import style

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        with style.applied():
            figure = CHARTS[name](result)
            if figure is None:
                continue
            target = folder / f"{prefix}{name}.{kind}"
            style.save(figure, target)
            written.append(target)
    return written
