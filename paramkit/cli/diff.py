"""`paramkit diff`: what differs between two checkpoints, and by how much."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compare import STATUSES, Compared, compare
from ..errors import dtype_text, fold_names
from ..explain import bytes_text
from ..sources import open_source
from .options import add_json, add_quiet, add_rules, parser, rules_of, unusable, wrong
from .progress import progress
from .text import columns, counted, say, say_json, width

__all__ = ["add"]

_SAME = ("equal", "close")


def add(commands: Any) -> None:
    command = parser(
        commands,
        "diff",
        "compare two checkpoints: equal, converted, changed by how much, reshaped, only in one",
        "Compare two checkpoints name by name. Equal means every bit. With rules, A is compared as the rules\n"
        "make it. Exit code: 0 equal, 1 different, 2 trouble. Memory is bounded, whatever the size of the files.",
        "paramkit diff before.safetensors after.safetensors --atol 1e-3",
    )
    for name in ("A", "B"):
        command.add_argument(
            name.lower(), metavar=name, type=Path, help="a file, an index or a folder of weights"
        )
    add_rules(command)
    command.add_argument(
        "--atol",
        type=_tolerance,
        default=0.0,
        metavar="X",
        help="values that differ by at most X are close, which counts as equal (default: 0)",
    )
    command.add_argument(
        "--allow-cast",
        action="store_true",
        help="equal after a conversion to the other's dtype counts as equal",
    )
    command.add_argument("--all", action="store_true", help="list what is equal, too")
    add_json(command)
    add_quiet(command)
    command.set_defaults(run=run, trouble=2)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number >= 0")
    return value


def run(options: argparse.Namespace) -> int:
    trouble = unusable(options)
    if trouble:
        return wrong("diff", trouble)
    rules = rules_of(options)
    a, b = open_source(options.a, mmap=False), open_source(options.b, mmap=False)
    with progress(options, "comparing") as advance:
        found = compare(a, b, rules, identity=options.identity, atol=options.atol, progress=advance)
    fine = (*_SAME, "cast-equal") if options.allow_cast else _SAME
    equal = all(c.status in fine for c in found)
    if options.json:
        counts = _counts(found)
        say_json({"equal": equal, "counts": counts, "tensors": [_as_data(c) for c in found]})
    else:
        heads = [_head("A", options.a, a), _head("B", options.b, b)]
        say("\n".join([*heads, *_lines(found, options.all), "", _verdict(found, equal)]))
    return 0 if equal else 1


def _as_data(c: Compared) -> dict[str, Any]:
    data: dict[str, Any] = {"name": c.name, "status": c.status}
    for side, shape, dtype in (("a", c.a_shape, c.a_dtype), ("b", c.b_shape, c.b_dtype)):
        if shape is not None:
            data[side] = {"shape": list(shape), "dtype": dtype_text(dtype)}
    if c.differing:
        # JSON has no infinity.
        largest = c.largest if c.largest is None or c.largest < float("inf") else "inf"
        data |= {"differing": c.differing, "max_abs": largest, "nan_differs": c.nan_differs}
    if c.note:
        data["note"] = c.note
    return data


# ---- text ----------------------------------------------------------------------------------------


def _head(side: str, path: Path, tensors: Mapping[str, Any]) -> str:
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return f"{side}: {path}: {counted(len(tensors), 'tensor')}, {bytes_text(size)}"


def _counts(found: Sequence[Compared]) -> dict[str, int]:
    counts = {status: sum(c.status == status for c in found) for status in STATUSES}
    return {status: count for status, count in counts.items() if count}


def _verdict(found: Sequence[Compared], equal: bool) -> str:
    counts = ", ".join(f"{count:,} {status}" for status, count in _counts(found).items())
    return f"{'equal' if equal else 'different'}: {counts or 'no tensors'}"


def _lines(found: Sequence[Compared], everything: bool) -> list[str]:
    lines: list[str] = []
    for status in STATUSES:
        own = [c for c in found if c.status == status]
        if own and (status != "equal" or everything):
            lines += ["", f"{status}, {counted(len(own), 'tensor')}:"]
            lines += _section(own)
    return lines


def _section(found: Sequence[Compared]) -> list[str]:
    """Names that differ in their layers, and in the same way, as one row; what differs at its end or below."""
    alike: dict[tuple[str, str, str], list[Compared]] = {}
    for c in found:
        shapes = _pair(c.a_shape, c.b_shape, str)
        alike.setdefault((shapes, _pair(c.a_dtype, c.b_dtype, dtype_text), c.note), []).append(c)
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    place = {c.name: k for k, c in enumerate(found)}
    groups = []
    for (shapes, dtypes, note), members in alike.items():
        by_name = {c.name: c for c in members}
        for folded, names in fold_names(by_name):
            groups.append(
                (place[names[0]], folded, shapes, dtypes, note, [by_name[n] for n in names])
            )
    for _, folded, shapes, dtypes, note, own in sorted(groups, key=lambda group: group[0]):
        rows.append((f"  {folded}", shapes, dtypes))
        notes.append("; ".join(filter(None, (_difference(own), note))))
    lines = columns(rows)
    widest = max(map(len, lines))
    room = width() - widest - 2
    if all(len(note) <= room for note in notes):
        return [f"{line.ljust(widest)}  {note}".rstrip() for line, note in zip(lines, notes)]
    return [
        text for line, note in zip(lines, notes) for text in (line, f"      {note}") if text.strip()
    ]


def _pair(a: Any, b: Any, text: Any) -> str:
    sides = [text(side) for side in (a, b) if side is not None]
    return sides[0] if len(set(sides)) == 1 else " -> ".join(sides)


def _difference(members: Sequence[Compared]) -> str:
    """How much tensors differ, together."""
    differing = sum(c.differing for c in members)
    if not differing:
        return ""
    parts = []
    numbers = [c for c in members if c.largest is not None]
    if numbers:
        worst = max(numbers, key=lambda c: c.largest or 0.0)
        where = f" in {worst.name}" if len(members) > 1 and worst.largest else ""
        # Zeros of both signs, or NaNs of other payload beside equal numbers.
        amount = f"max {worst.largest:.3g}{where}" if worst.largest else "the same numbers"
        parts.append(amount)
    elements = sum(_elements(c) for c in members)
    nans = sum(c.nan_differs for c in members)
    if nans:
        parts.append(f"{nans:,} NaN in one alone")
    elif not numbers:
        parts.append("other bits in NaNs")
    parts.append(f"{differing:,} of {elements:,} elements")
    return ", ".join(parts)


def _elements(c: Compared) -> int:
    count = 1
    for n in c.b_shape or ():
        count *= n
    return count
