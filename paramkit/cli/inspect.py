"""`paramkit inspect`: what is in a checkpoint, by its headers alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..destinations import memory_key
from ..errors import dtype_text, fold_names, split_numbers
from ..explain import bytes_text
from ..sources import Stored, open_source
from .files import checkpoints, files_of, metadata_of, stored_files
from .odd import Odd, odd_things
from .options import add_json, parser
from .text import columns, counted, say, say_json

__all__ = ["Contents", "add", "contents"]


def add(commands: Any) -> None:
    command = parser(
        commands,
        "inspect",
        "show what is in a checkpoint: names, shapes, dtypes, ties, what is odd",
        "Show what is in a checkpoint: names folded by layer range, shapes, dtypes, bytes, ties, and what is\n"
        "odd. Only headers are read.",
        "paramkit inspect model.safetensors.index.json",
    )
    command.add_argument(
        "source",
        metavar="FILE",
        type=Path,
        help="a .safetensors file, a checkpoint of torch.save, an index, or a folder: of these, or of "
        "torch.distributed.checkpoint",
    )
    add_json(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    found = contents(options.source)
    if options.json:
        say_json(found.as_data())
    else:
        say("\n".join(found.lines()))
    return 0


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Attributes:
        path: what was opened.
        tensors: name -> tensor, lazy where that can be.
        files: (path, bytes, tensors in it).
        metadata: of `.safetensors` files.
        ties: groups of names of the same memory.
        odd: what should not be there, or is missing.
    """

    path: Path
    tensors: Mapping[str, Any]
    files: list[tuple[Path, int, int]]
    metadata: dict[str, str]
    ties: list[list[str]]
    odd: list[Odd]

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "path": str(self.path),
            "files": [
                {"path": str(path), "bytes": size, "tensors": count}
                for path, size, count in self.files
            ],
            "metadata": self.metadata,
            "tensors": {name: _as_data(tensor) for name, tensor in self.tensors.items()},
            "dtypes": {
                dtype: {"tensors": count, "elements": elements, "bytes": size}
                for dtype, (count, elements, size) in _totals(self.tensors).items()
            },
            "ties": self.ties,
            "odd": [asdict(odd) for odd in self.odd],
        }

    def lines(self) -> list[str]:
        """As text."""
        totals = _totals(self.tensors)
        elements, size = (sum(t[k] for t in totals.values()) for k in (1, 2))
        lines = [
            f"{self.path}: {counted(len(self.tensors), 'tensor')}, {elements:,} elements, "
            f"{bytes_text(size)}"
        ]
        lines += [f"  {key}: {_cut(value)}" for key, value in self.metadata.items()]
        lines += ["", *columns(_rows(self.tensors), right=[3, 4])]
        if len(totals) > 1:
            rows = [
                (dtype, counted(t[0], "tensor"), f"{t[1]:,} elements", bytes_text(t[2]))
                for dtype, t in totals.items()
            ]
            lines += ["", *columns(rows, right=[1, 2, 3])]
        if len(self.files) > 1:
            files = [
                (str(path), counted(count, "tensor"), bytes_text(size))
                for path, size, count in self.files
            ]
            lines += ["", *columns(files, right=[1, 2])]
        if self.ties:
            lines += ["", "tied, one memory under several names:"]
            lines += [f"  {' = '.join(group)}" for group in folded_together(self.ties)]
        if self.odd:
            lines += ["", "odd:"]
            for odd in self.odd:
                lines.append(f"  {odd.text}")
                if odd.hint:
                    lines.append(f"    {odd.hint}")
        return lines


def contents(path: Path) -> Contents:
    """Look into a checkpoint.

    Raises:
        SourceError: it cannot be read.
    """
    tensors = open_source(path, mmap=False)
    ties: dict[object, list[str]] = {}
    counts: dict[object, int] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            ties.setdefault(memory_key(tensor), []).append(name)
        if isinstance(tensor, Stored):
            counts[tensor.file.identity] = counts.get(tensor.file.identity, 0) + 1
    files = [(f.path, f.size, counts[f.identity]) for f in stored_files(tensors)]
    for checkpoint in checkpoints(tensors):
        files += checkpoint.data_files()
    if not files:  # of a format that is read into memory
        paths = [p for p in files_of(path, tensors) if not p.name.endswith(".json")]
        files = [(p, p.stat().st_size, len(tensors)) for p in paths] if len(paths) == 1 else []
    return Contents(
        path,
        tensors,
        files,
        metadata_of(tensors),
        [names for names in ties.values() if len(names) > 1],
        odd_things(tensors),
    )


def folded_together(groups: list[list[str]]) -> list[list[str]]:
    """Groups of names that are equal but for their layers as one group, where each folds to one range.

    Example:
        >>> folded_together([["a.0.w", "b.0.w"], ["a.1.w", "b.1.w"], ["c", "d"]])
        [['a.{0..1}.w', 'b.{0..1}.w'], ['c', 'd']]
    """
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for group in groups:
        split = [split_numbers(name) for name in group]
        # Only where a group is about one layer: otherwise the ranges would not say which goes with which.
        one = len({n for _, numbers in split for n in numbers}) == 1
        key = tuple(template for template, _ in split) if one else tuple(group)
        alike.setdefault(key, []).append(group)
    out = []
    for members in alike.values():
        sides = [[text for text, _ in fold_names(side)] for side in zip(*members, strict=True)]
        if len(members) > 1 and all(len(side) == 1 for side in sides):
            out.append([side[0] for side in sides])
        else:
            out += members
    return out


def _rows(tensors: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: one row for names of one shape and dtype that differ in their layers."""
    alike: dict[tuple[str, str], list[str]] = {}
    order: dict[str, int] = {}  # layers of one kind stay together, whatever their shapes and dtypes
    for name, tensor in tensors.items():
        order.setdefault(split_numbers(name)[0], len(order))
        alike.setdefault((str(tuple(tensor.shape)), dtype_text(tensor.dtype)), []).append(name)
    rows = []
    for (shape, dtype), names in alike.items():
        for folded, members in fold_names(names):
            size = sum(_bytes(tensors[name]) for name in members)
            cells = (folded, shape, dtype, f"{len(members):,}", bytes_text(size))
            rows.append((order[split_numbers(members[0])[0]], cells))
    head = ("name", "shape", "dtype", "tensors", "bytes")
    return [head, *(cells for _, cells in sorted(rows, key=lambda row: row[0]))]


def _totals(tensors: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """dtype -> (tensors, elements, bytes), the one of most bytes first."""
    totals: dict[str, tuple[int, int, int]] = {}
    for tensor in tensors.values():
        count, elements, size = totals.get(dtype_text(tensor.dtype), (0, 0, 0))
        own = (count + 1, elements + tensor.numel(), size + _bytes(tensor))
        totals[dtype_text(tensor.dtype)] = own
    return dict(sorted(totals.items(), key=lambda item: -item[1][2]))


def _bytes(tensor: Any) -> int:
    """Of its elements, without what lies between them."""
    return int(tensor.numel() * tensor.element_size())


def _as_data(tensor: Any) -> dict[str, Any]:
    data = {
        "shape": list(tensor.shape),
        "dtype": dtype_text(tensor.dtype),
        "bytes": _bytes(tensor),
    }
    if isinstance(tensor, Stored):
        data |= {"file": str(tensor.file.path), "offset": tensor.offset}
        if not tensor.is_contiguous():
            data["strides"] = list(tensor.strides)
    return data


def _cut(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + ".."
