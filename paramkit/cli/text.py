"""What commands print: plain text in columns, safe for any terminal, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import Any, TextIO

from ..explain import shortened

__all__ = ["columns", "counted", "fail", "fitted", "say", "say_json", "width"]

_GAP = "  "
# No name column is squeezed below this: less is no longer a name.
_NARROWEST = 24


def say(text: str, stream: TextIO | None = None) -> None:
    """Print text that may hold names from a file, which may hold anything.

    Control characters, and what the stream's encoding does not have, are shown escaped.
    """
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = _visible(text).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream)


def say_json(value: Any) -> None:
    """Print a value as JSON, in ASCII."""
    print(json.dumps(value, indent=2))


def fail(text: str) -> None:
    """Print a message about this program to stderr."""
    say(f"paramkit: {text}", sys.stderr)


def _visible(text: str) -> str:
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def width() -> int:
    """Columns of the terminal, or 120 where there is none."""
    return get_terminal_size((120, 24)).columns


def counted(n: int, what: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "tensor"), counted(2000, "tensor")
        ('1 tensor', '2,000 tensors')
    """
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def columns(
    rows: Sequence[Sequence[str]], right: Sequence[int] = (), *, most: int | None = None
) -> list[str]:
    """Rows as lines of aligned columns. Names in the first column lose components where it is too wide.

    Args:
        rows: cells, the same number in each row.
        right: columns that are aligned to the right.
        most: columns of text to fit into; None takes the terminal's.

    Example:
        >>> columns([("name", "bytes"), ("h.{0..11}.w", "96")], right=[1])
        ['name         bytes', 'h.{0..11}.w     96']
    """
    if not rows:
        return []
    cells = [[_visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    others = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
    room = max((width() if most is None else most) - others, _NARROWEST)
    names = [row[0] for row in cells]
    # Names that would become equal stay whole: a line too long is better than one that misleads.
    if room < widths[0] and len({fitted(n, room) for n in names}) == len(set(names)):
        widths[0] = room
    lines = []
    for row in cells:
        texts = [fitted(row[0], widths[0]), *row[1:]]
        padded = [
            t.rjust(n) if k in right else t.ljust(n)
            for k, (t, n) in enumerate(zip(texts, widths, strict=True))
        ]
        lines.append(_GAP.join(padded).rstrip())
    return lines


def fitted(name: str, room: int) -> str:
    """A name in at most so many columns."""
    return name if len(name) <= room else shortened(name, room)
