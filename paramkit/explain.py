"""A resolved plan as a table that a person can check, rows folded by layer range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from shutil import get_terminal_size

from .errors import Numbers, dtype_text, fold_names, fold_numbers, join_numbers, split_numbers
from .resolve import Resolved, Write

__all__ = ["explain"]

WIDTH = 120
# No name column is squeezed below this: less is no longer a name.
_NARROWEST = 24
Rank = tuple[int, int]  # where a row stands: its first destination, and the place in it

_HEAD = ("destination", "source", "shape", "dtype", "how")


def explain(
    resolved: Resolved, routes: Mapping[int, str] | None = None, *, width: int | None = None
) -> str:
    """The writes of a plan as a plain-text table with totals.

    Args:
        resolved: what `resolve` returned.
        routes: for each write, by its number, the kernel that runs it ("copy", "transpose",
            "native"); counted at the end, and shown in the rows where there are several.
        width: columns to fit into; None takes the terminal's, or 120 where there is none. Long
            names lose components, the numbers and the end are kept; where two names would become
            equal, sources stand below their destinations instead. Patterns are never shortened, so
            that a very long one may make a line longer.

    Returns:
        Lines of text without a final newline: the table, then totals, casts, what is kept and what is
        dropped.

    Example:
        >>> import torch
        >>> from .resolve import resolve
        >>> model = {f"h.{i}.w": torch.zeros(2, 3) for i in range(4)}
        >>> print(explain(resolve(model, model)))
        destination  source    shape   dtype    how
        h.{0..3}.w   the same  (2, 3)  float32  whole
        <BLANKLINE>
        4 writes into 4 of 4 tensors, 24 elements, 96 bytes
    """
    if width is None:
        width = get_terminal_size((WIDTH, 24)).columns
    kinds = Counter((routes or {}).values())
    table = _rows(resolved, (routes or {}) if len(kinds) > 1 else {})
    lines = _layout(table, width) if table else []
    lines += ["", *_totals(resolved, kinds, width)] if table else _totals(resolved, kinds, width)
    return "\n".join(lines)


# ---- rows ----------------------------------------------------------------------------------------


def _rows(resolved: Resolved, routes: Mapping[int, str]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of the destinations."""
    # Writes that are equal but for integers in their names come together, whatever the integers.
    groups: dict[tuple[str, ...], list[tuple[Rank, Numbers, Numbers]]] = {}
    for number, write in enumerate(resolved.writes):
        destination = resolved.destinations[write.dst]
        source = resolved.source_names[write.src]
        # Of tied names the one is shown that the source knows too.
        name = source if source in destination.aliases else destination.name
        template, numbers = split_numbers(name)
        source_template, source_numbers = split_numbers(source)
        how, route = write.text or "whole", routes.get(number)
        key = (
            template,
            source_template,
            # Of a slice of a fused parameter, the shape of what goes into it.
            str(tuple(resolved.source_tensors[write.src].shape) if write.text else write.sizes),
            _dtype_text(resolved, write),
            f"{how} [{route}]" if route else how,
        )
        groups.setdefault(key, []).append(((write.dst, write.dst_offset), numbers, source_numbers))

    cells: list[tuple[Rank, tuple[str, ...]]] = []
    for (template, source_template, *rest), members in groups.items():
        links, extra = _linked([(own, other) for _, own, other in members])
        rows = [own + tuple(other[j] for j in extra) for _, own, other in members]
        own_count = len(members[0][1])
        for folded, found in fold_numbers(rows):
            texts = [
                folded[own_count + extra.index(j) if link is None else link]
                for j, link in enumerate(links)
            ]
            name = join_numbers(template, folded[:own_count])
            source = join_numbers(source_template, texts)
            same = source == name and template == source_template
            first = min(members[k][0] for k in found)
            cells.append((first, (name, "the same" if same else source, *rest)))
    return [row for _, row in sorted(cells, key=lambda cell: cell[0])]


def _linked(rows: Sequence[tuple[Numbers, Numbers]]) -> tuple[list[int | None], list[int]]:
    """Which integers of the sources are integers of the destinations.

    Args:
        rows: for each write the integers of its destination's name and of its source's.

    Returns:
        (for each integer of a source name the place in the destination's that always has the same
        value, or None; the places with None, such as the expert of a stack).
    """
    links: list[int | None] = []
    for j in range(len(rows[0][1])):
        places = sorted(range(len(rows[0][0])), key=lambda i: i != j)  # the same place is likeliest
        equal = (i for i in places if all(own[i] == other[j] for own, other in rows))
        links.append(next(equal, None))
    return links, [j for j, link in enumerate(links) if link is None]


def _dtype_text(resolved: Resolved, write: Write) -> str:
    src = dtype_text(resolved.source_tensors[write.src].dtype)
    dst = dtype_text(resolved.destinations[write.dst].tensor.dtype)
    return dst if src == dst else f"{src} -> {dst}"


# ---- layout --------------------------------------------------------------------------------------


def _layout(table: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """The table in one line a row, or in two where names would be shortened beyond recognition."""
    rows = [_HEAD, *table]
    widths = [max(len(row[k]) for row in rows) for k in range(len(_HEAD))]
    # What does not fit is taken from the two name columns, from the wider one first.
    excess = sum(widths) + 2 * (len(_HEAD) - 1) - width
    while excess > 0 and max(widths[0], widths[1]) > _NARROWEST:
        widths[0 if widths[0] >= widths[1] else 1] -= 1
        excess -= 1
    for k in (0, 1):
        names = {row[k] for row in rows}
        if len({_fit(name, widths[k]) for name in names}) < len(names):
            return _tall_layout(table, width)
    return [_line(row, widths) for row in rows]


def _tall_layout(table: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Sources below their destinations."""
    head = ("destination <- source", *_HEAD[2:])
    cells = [(row[0], *row[2:]) for row in table]
    widths = [max(len(row[k]) for row in (head, *cells)) for k in range(len(head))]
    widths[0] = max(min(widths[0], width - sum(widths[1:]) - 2 * (len(head) - 1)), _NARROWEST)
    lines = [_line(head, widths)]
    for row, short in zip(table, cells, strict=True):
        lines.append(_line(short, widths))
        if row[1] != "the same":
            lines.append(f"  <- {row[1]}")
    return lines


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(_fit(cell, w) for cell, w in zip(row, widths, strict=True)).rstrip()


def _fit(text: str, width: int) -> str:
    """Text in exactly `width` columns: padded, or shortened."""
    return (text if len(text) <= width else shortened(text, width)).ljust(width)


def shortened(name: str, width: int) -> str:
    """A name without some of its components, the telling ones kept: numbers, and those at the end.

    Example:
        >>> shortened("encoder.layer.{0..5}.attention.self.query.weight", 36)
        '..{0..5}.attention.self.query.weight'
    """
    parts = _components(name)
    last = len(parts) - 1
    order = sorted(range(last), key=lambda k: (parts[k][:1] not in "{0123456789", -k))
    kept = {last}
    for k in order:
        if len(_elided(parts, kept | {k})) <= width:
            kept.add(k)
    text = _elided(parts, kept)
    return text if len(text) <= width else text[: width - 2] + ".."


def _components(name: str) -> list[str]:
    """The name split at its dots, but for the dots of ranges: `{0..5}` is one component."""
    parts: list[str] = []
    for part in name.split("."):
        if parts and parts[-1].count("{") > parts[-1].count("}"):
            parts[-1] += "." + part
        else:
            parts.append(part)
    return parts


def _elided(parts: Sequence[str], kept: set[int]) -> str:
    text = ""
    for k, part in enumerate(parts):
        if k in kept:
            text += part if not text or text.endswith("..") else "." + part
        elif not text.endswith(".."):
            text += ".."
    return text


# ---- totals --------------------------------------------------------------------------------------


def _totals(resolved: Resolved, kinds: Counter[str], width: int) -> list[str]:
    elements = 0
    size = 0
    casts: dict[str, int] = {}
    touched = set()
    for write in resolved.writes:
        tensor = resolved.destinations[write.dst].tensor
        count = prod(write.sizes)
        elements += count
        size += count * tensor.element_size()
        touched.add(write.dst)
        if resolved.source_tensors[write.src].dtype != tensor.dtype:
            text = _dtype_text(resolved, write)
            casts[text] = casts.get(text, 0) + 1
    n = len(resolved.writes)
    lines = [
        f"{n:,} {'write' if n == 1 else 'writes'} into {len(touched):,} of "
        f"{len(resolved.destinations):,} tensors, {elements:,} elements, {bytes_text(size)}"
    ]
    if kinds:
        lines.append("kernels: " + ", ".join(f"{k:,} {text}" for text, k in kinds.most_common()))
    if casts:
        lines.append("casts: " + ", ".join(f"{text} ({k:,})" for text, k in casts.items()))
    for label, names in (
        ("kept as they are", resolved.kept),
        ("written in part", resolved.partial),
        ("dropped from the source", resolved.dropped),
    ):
        if names:
            lines += _wrapped(
                f"{label} ({len(names):,}): ", [f for f, _ in fold_names(names)], width
            )
    return lines


def _wrapped(label: str, items: Sequence[str], width: int) -> list[str]:
    lines, line = [], label
    for k, item in enumerate(items):
        piece = item + (", " if k < len(items) - 1 else "")
        if len(line) + len(piece.rstrip()) > width and line.strip() and line != label:
            lines.append(line.rstrip())
            line = "    "
        line += piece
    return [*lines, line]


def bytes_text(size: int) -> str:
    """A number of bytes for reading.

    Example:
        >>> bytes_text(96), bytes_text(90_868_376)
        ('96 bytes', '86.7 MiB')
    """
    for unit, one in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= one:
            return f"{size / one:.1f} {unit}"
    return f"{size} bytes"
