"""Many files as one source: by an index that says which name is in which file, or by their folder.

An index names files beside it. Absolute paths and `..` are refused, by their text alone: where a file
is a symbolic link it is followed, because the caches of model hubs are made of links to files elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import Finding, SourceError
from . import strict_json
from .faults import AGAIN, PICKLES, look_alike, one_fault, type_text
from .reading import StoredFile
from .safetensors_file import MAX_HEADER

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .lazy import Lazy

__all__ = ["choose", "open_index"]

# In this order; another index only if it is the only one.
_FIRST = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What trainers leave beside the weights, in the same formats.
_OTHER = re.compile(r"(training_args|optimizer|optim|scheduler|scaler|rng_state|random_state).*")


def choose(folder: Path) -> Path | list[Path]:
    """The file or files of a folder that hold its weights.

    Args:
        folder: a folder that exists.

    Returns:
        The path of an index or of a single file, or else all files of one kind: `.safetensors` before
        those of torch.save, of which `pytorch_model.bin` comes first and optimizer states and the like
        are left out.

    Raises:
        SourceError: it holds no weights, or several indexes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "model.safetensors").write_bytes(b"")
        ...     choose(Path(folder)).name
        'model.safetensors'
    """
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        hint = "check its permissions"
        raise one_fault(
            "the source cannot be looked at.", str(folder), "file", str(error), "", hint
        ) from error
    indexes = [path for path in inside if path.name.endswith(".index.json")]
    first = next((folder / name for name in _FIRST if folder / name in indexes), None)
    if first is not None:
        return first
    if len(indexes) > 1:
        raise one_fault(
            "the source is a folder with several indexes.",
            str(folder),
            "file",
            ", ".join(path.name for path in indexes),
            "one of them",
            "pass the path of the one that is meant",
        )
    if indexes:
        return indexes[0]
    found = [path for path in inside if path.suffix == ".safetensors"]
    if not found:
        found = [p for p in inside if p.suffix in PICKLES and not _OTHER.fullmatch(p.name)]
        found = [p for p in found if p.name == "pytorch_model.bin"] or found
    if not found:
        raise one_fault(
            "the source is a folder.",
            str(folder),
            "file",
            "a folder without weights",
            "an index, .safetensors files, or checkpoints of torch.save in it",
            "it holds no .safetensors file",
        )
    return found if len(found) > 1 else found[0]


def open_index(
    path: Path, open_file: Callable[[Path], dict[str, Tensor | Lazy]]
) -> dict[str, Tensor | Lazy]:
    """The tensors that an index names, in its order.

    Args:
        path: a `*.index.json` file, an object with a `weight_map` from tensor names to file names.
        open_file: opens one of the files.

    Returns:
        name -> tensor.

    Raises:
        SourceError: lists all that is wrong: entries of other types, paths out of the folder, files that
            are missing or damaged, names that are not in the file named, names that are in a file but
            not in the index.
    """
    weight_map = _read(path)
    findings: list[Finding] = []
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        trouble = _file_trouble(file)
        if trouble:
            findings.append(
                Finding(
                    name,
                    "file",
                    trouble,
                    "the name of a file beside the index",
                    f"correct weight_map in {path}",
                )
            )
        else:
            by_file.setdefault(file, []).append(name)
    tensors: dict[str, Tensor | Lazy] = {}
    for file, names in by_file.items():
        try:
            opened = open_file(path.parent / file)
        except SourceError as error:
            findings.extend(error.findings)
            continue
        wanted = set(names)
        findings.extend(
            Finding(name, "missing", f"not in {file}", "there by the index", AGAIN)
            for name in names
            if name not in opened
        )
        for name in opened:
            if name in wanted:
                tensors[name] = opened[name]
                continue
            elsewhere = weight_map.get(name)
            where = f"in {elsewhere} by the index" if elsewhere else "not in the index"
            findings.append(
                Finding(name, "unexpected", f"in {file}", where, "index and files do not match")
            )
    if findings:
        raise SourceError(
            f"the files of {path} cannot be used, {len(findings)} problems; nothing was written.",
            findings,
        )
    return {name: tensors[name] for name in weight_map}


def _read(path: Path) -> dict[str, Any]:
    """The weight map of an index, a dict from names to anything."""
    file = StoredFile(path)
    if file.size > MAX_HEADER:
        raise file.fault(f"{file.size} bytes", f"an index of at most {MAX_HEADER}")
    raw = file.bytes(0, file.size)
    known = look_alike(raw[:16])
    if known:
        raise file.fault(known[0], hint=known[1])
    try:
        content = strict_json.parse(raw)
    except ValueError as error:
        raise file.fault(
            f"an index that cannot be read ({str(error)[:300]})", "JSON", f"corrupt; {AGAIN}"
        ) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        if not isinstance(content, dict):
            got = type_text(content)
        elif "weight_map" not in content:
            got = "an object without weight_map"
        else:
            got = (
                "an empty weight_map" if weight_map == {} else f"weight_map {type_text(weight_map)}"
            )
        raise file.fault(got, "weight_map, an object from tensor names to file names")
    return weight_map


def _file_trouble(file: object) -> str:
    """Why an index may not name this file, "" where it may."""
    if not isinstance(file, str):
        return type_text(file)
    pure = PurePosixPath(file)
    if pure.is_absolute() or re.match(r"[A-Za-z]:[\\/]", file):
        return f"the absolute path {file!r}"
    if ".." in pure.parts or ".." in re.split(r"[\\/]", file):
        return f"{file!r}, out of the folder"
    if not pure.parts or not file.isprintable():
        return f"{file!r}, no file name"
    return ""
