"""Puts a result into the documents: ``python -m benchmarks.publish RESULT.json``.

Writes what lies between the markers in README.md (a short selection) and in benchmarks/results/README.md
(everything, a section for each result), and draws the charts beside the result. Doing it twice changes
nothing. Result files lie in benchmarks/results, so that figures in documents have a source.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import charts, table

__all__ = ["BEGIN", "END", "SELECTION", "main", "publish", "replaced"]

ROOT = Path(__file__).resolve().parent.parent

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

SELECTION = (
    "foreach_copy 1000x64",
    "replay 1000x64",
    "load_state_dict 2004",
    "fill slices 8x8x3x3",
    "replay slices 8x8x3x3",
    "writes module 1000",
    "copy 256 MiB",
    "fill 256 MiB",
    "column slice",
    "permute 4096x4096->10 float32",
    "permute 4096x4096->10 uint8",
    "cast float32->bfloat16",
    "cast bfloat16->float8_e4m3fn",
    "memory permute with a cast",
)
"""The cases of the README: every kind of write, chosen by name and not by how they come out."""

README_CHARTS = ("bandwidth",)


def replaced(document: str, block: str, after: str = "") -> str:
    """The document with `block` between its markers: the first ones behind the text `after`.

    Raises:
        ValueError: there is no such pair of markers.
    """
    start = document.find(after)
    begin = document.find(BEGIN, max(start, 0))
    end = document.find(END, begin)
    if start < 0 or begin < 0 or end < 0:
        raise ValueError(f"no {BEGIN} ... {END}" + (f" behind {after!r}" if after else ""))
    return document[: begin + len(BEGIN)] + "\n" + block.strip() + "\n" + document[end:]


def _images(paths: Sequence[Path], base: Path) -> str:
    titles = {
        "bandwidth": "Bandwidth of contiguous copies and fills against their size",
        "ratios": "Times faster than torch, case by case",
        "limit-shares": "Permuted copies: share of the memory's limit",
    }
    return "\n\n".join(
        f"![{titles[path.stem]}]({path.relative_to(base).as_posix()})" for path in paths
    )


def _readme(result: Mapping[str, Any], images: str, base: Path, source: Path) -> str:
    chosen = [
        row
        for row in result["cases"]
        if any(fnmatch(row["name"], pattern) for pattern in SELECTION)
    ]
    lines = [images, "", table.flat({**result, "cases": chosen})]
    results = source.parent.relative_to(base).as_posix()
    lines += ["", f"{table.summary(result)} All of them are in [{results}]({results}/README.md)."]
    return "\n".join(lines)


def _section(document: str, name: str) -> str:
    """The results' README with a section for the file `name`, made if there is none."""
    heading = f"## {name}\n"
    if heading in document:
        return document
    return f"{document.rstrip()}\n\n{heading}\n{BEGIN}\n{END}\n"


def publish(source: Path, root: Path = ROOT) -> list[Path]:
    """Write the documents and the charts of one result; returns the files that have changed.

    Raises:
        ValueError: a document has no markers, or the result does not lie under `root`.
    """
    source, root = source.resolve(), root.resolve()
    if root not in source.parents:
        raise ValueError(f"{source} does not lie in {root}")
    result = table.load(source)
    folder = source.with_suffix("")
    before = {path: path.read_bytes() for path in folder.glob("*.svg")}
    drawn = charts.draw(result, folder)
    changed = [path for path in drawn if before.get(path) != path.read_bytes()]

    readme, own = root / "README.md", source.parent / "README.md"
    short = [path for path in drawn if path.stem in README_CHARTS]
    block = _readme(result, _images(short, root), root, source)
    texts = {readme: replaced(readme.read_text(encoding="utf-8"), block)}
    block = _images(drawn, source.parent) + "\n\n" + table.markdown(result)
    document = _section(own.read_text(encoding="utf-8"), source.name)
    texts[own] = replaced(document, block, f"## {source.name}\n")
    for path, text in texts.items():
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m benchmarks.publish``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("result", type=Path, help="a JSON file in benchmarks/results")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        changed = publish(options.result, options.root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path in changed:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
