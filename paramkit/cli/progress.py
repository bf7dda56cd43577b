"""A progress bar, on a terminal only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(options: argparse.Namespace, label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, which is gone at the end.

    There is none with `--quiet` or `--json`, where stderr is no terminal, and without the package rich.

    Yields:
        A function to be called with (bytes done, bytes in all).
    """
    wanted = not options.quiet and not options.json and sys.stderr is not None
    if not wanted or not sys.stderr.isatty():
        yield _nothing
        return
    try:
        from rich import progress as bars
        from rich.console import Console
    except ModuleNotFoundError:
        yield _nothing
        return
    bar = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _nothing(done: int, total: int) -> None:
    pass
