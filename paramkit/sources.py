"""Sources: whatever holds values, opened as named tensors.

A module, a mapping, or a `.safetensors` file all become a dict of tensors. A file is memory-mapped:
opening it reads its header, and the bytes of a tensor are read when they are written elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import Finding, SourceError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

__all__ = ["module_tensors", "open_source"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What checkpoints nest their weights under.
_NESTS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")


def open_source(source: object) -> dict[str, Tensor]:
    """The named tensors of a source.

    Args:
        source: an `nn.Module` (its parameters and persistent buffers, under every name they have), a
            mapping from names to tensors, the path of a `.safetensors` file, or a list of such paths
            (a sharded checkpoint).

    Returns:
        name -> tensor, in the source's order. No data is copied; tensors of a file are views of the
        memory-mapped file.

    Raises:
        SourceError: an object of another type, a mapping with values that are no tensors (all of them
            are listed), or a file that is missing, of another format, truncated or corrupt.

    Example:
        >>> import torch
        >>> open_source(torch.nn.Linear(3, 2))["weight"].shape
        torch.Size([2, 3])
    """
    if isinstance(source, torch.nn.Module):
        return {name: tensor for name, tensor, *_ in module_tensors(source)}
    if isinstance(source, Mapping):
        return _open_mapping(source)
    if isinstance(source, (str, os.PathLike)):
        return _open_file(Path(source))
    if (
        isinstance(source, (list, tuple))
        and source
        and all(isinstance(s, (str, os.PathLike)) for s in source)
    ):
        return _open_files([Path(s) for s in source])
    if isinstance(source, (list, tuple)) and not source:
        raise _error(
            "the source is an empty list.", "source", "type", got="[]", expected="at least one path"
        )
    raise _error(
        "the source cannot be read.",
        "source",
        "type",
        got=_type_text(source),
        expected="an nn.Module, a mapping from names to tensors, or the path of a .safetensors file",
    )


def module_tensors(
    module: nn.Module,
) -> Iterator[
    tuple[str, Tensor, nn.Module, str, str, tuple[tuple[nn.Module, str, nn.Module], ...]]
]:
    """Parameters and persistent buffers of a module, in the order and under the names of its state dict.

    Walks the modules itself, so that no hook runs and nothing is detached. A module or a parameter
    that is reachable under several names is given under each of them.

    Yields:
        (name, tensor, owner, key, "parameter" or "buffer", path), where path holds
        (parent, child key, child) from the root to the owner.
    """
    Step = tuple[str, "nn.Module", tuple[tuple["nn.Module", str, "nn.Module"], ...]]
    stack: list[Step] = [("", module, ())]
    while stack:
        prefix, owner, path = stack.pop()
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield prefix + key, parameter, owner, key, "parameter", path
        transient = owner._non_persistent_buffers_set
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in transient:
                yield prefix + key, buffer, owner, key, "buffer", path
        for key, child in reversed(owner._modules.items()):
            # A module that contains itself would be walked forever; each turn has the same parameters.
            if child is None or child is module or any(child is step[2] for step in path):
                continue
            stack.append((f"{prefix}{key}.", child, (*path, (owner, key, child))))


# ---- mappings ------------------------------------------------------------------------------------


def _open_mapping(source: Mapping[Any, Any]) -> dict[str, Tensor]:
    findings = []
    tensors: dict[str, Tensor] = {}
    for name, value in source.items():
        if not isinstance(name, str):
            findings.append(Finding(f"source[{name!r}]", "type", _type_text(name), "a name (str)"))
        elif isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            findings.append(
                Finding(name, "type", _type_text(value), "a tensor", _value_hint(name, value))
            )
    if findings:
        raise SourceError(
            f"the source mapping has {len(findings)} of {len(source)} entries that are not named tensors; "
            "nothing was written.",
            findings,
        )
    return tensors


def _value_hint(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        inner = next((v for v in value.values()), None)
        nested = name in _NESTS or isinstance(inner, torch.Tensor)
        return (
            f'a nested checkpoint? pass source["{name}"]'
            if nested
            else "leave it out of the source"
        )
    if isinstance(value, torch.nn.Module):
        return f'pass source["{name}"] itself, or its state_dict()'
    if type(value).__module__.split(".")[0] == "numpy":
        return "convert it with torch.from_numpy"
    if name.endswith("_extra_state"):
        return "extra state is not a weight; leave it out of the source"
    if isinstance(value, (bool, int, float, complex)):
        return "convert it with torch.tensor, or leave it out of the source"
    return "leave it out of the source"


def _type_text(value: object) -> str:
    kind = type(value)
    if isinstance(value, (bool, int, float, complex)) or value is None:
        return f"{kind.__name__} {value!r}" if value is not None else "None"
    return (
        kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    )


# ---- files ---------------------------------------------------------------------------------------


def _open_files(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    findings: list[Finding] = []
    for path in paths:
        try:
            opened = _open_file(path)
        except SourceError as error:
            findings.extend(error.findings)
            continue
        for name, tensor in opened.items():
            if name in tensors:
                findings.append(
                    Finding(
                        name, "conflict", f"in {origin[name]} and in {path}", "one file to hold it"
                    )
                )
            tensors[name], origin[name] = tensor, path
    if findings:
        raise SourceError(
            f"the {len(paths)} source files cannot be used; nothing was written.", findings
        )
    return tensors


def _open_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors" or not path.is_file():
        raise _unusable(path)
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except Exception as error:  # the reader's own errors are of several types and say little
        raise _diagnose(path, error) from error


def _unusable(path: Path) -> SourceError:
    """Why a path cannot be opened at all."""
    name = str(path)
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix == ".safetensors")
            shown = ", ".join(inside[:3]) + (", .." if len(inside) > 3 else "")
            hint = (
                f"pass the file itself; in it: {shown}"
                if inside
                else "it holds no .safetensors file"
            )
            return _error(
                "the source is a folder.", name, "file", "a folder", "a .safetensors file", hint
            )
        if not path.exists():
            folder = path.parent
            if not folder.is_dir():
                hint = f"there is no folder {folder}"
            else:
                near = suggest(
                    path.name, [p.name for p in folder.iterdir() if p.suffix == ".safetensors"]
                )
                hint = (
                    f"did you mean {folder / near}?"
                    if near
                    else f"the folder {folder.resolve()} has no such file"
                )
            return _error("the source file does not exist.", name, "file", "no such file", "", hint)
    except OSError as error:
        return _error(
            "the source cannot be looked at.", name, "file", str(error), "", "check its permissions"
        )
    if path.suffix in _PICKLES:
        hint = "load it with torch.load(path, weights_only=True) and pass the mapping"
    elif path.name.endswith(".safetensors.index.json"):
        hint = "pass the list of the .safetensors files that it names"
    elif path.suffix == ".safetensors":
        return _error(
            "the source is no regular file.",
            name,
            "file",
            "not a regular file",
            "a .safetensors file",
        )
    else:
        hint = "convert it, or load it yourself and pass a mapping from names to tensors"
    got = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
    return _error(
        "the source file has another format.", name, "file", got, "a .safetensors file", hint
    )


def _diagnose(path: Path, error: Exception) -> SourceError:
    """What is wrong with a file that the reader refused, in terms of the format."""
    name = str(path)
    again = "download or copy it again"

    def corrupt(got: str, expected: str = "", hint: str = again) -> SourceError:
        return _error("the source file cannot be read.", name, "file", got, expected, hint)

    try:
        size = path.stat().st_size
        if size == 0:
            return corrupt("an empty file (0 bytes)")
        with path.open("rb") as file:
            lead = file.read(8)
            length = int.from_bytes(lead, "little")
            header = file.read(min(length, 100_000_000)) if len(lead) == 8 else b""
    except OSError as trouble:
        return corrupt(str(trouble), hint="check its permissions")
    if size < 8:
        return corrupt(f"{size} bytes", "at least 8, the length of the header")
    if lead.startswith((b"version ", b"<")):
        what = "a Git LFS pointer" if lead.startswith(b"version ") else "a web page"
        return corrupt(
            f"{what}, not the weights themselves",
            hint="fetch the real file (git lfs pull, or download)",
        )
    if lead[:2] == b"PK" or lead[:1] == b"\x80":
        hint = "load it with torch.load(path, weights_only=True) and pass the mapping"
        return corrupt("a pickled checkpoint under a .safetensors name", hint=hint)
    if length > size - 8:
        return corrupt(
            f"a header of {length} bytes announced in a file of {size}",
            "a header within the file",
            f"truncated in the header, or corrupt; {again}",
        )
    try:
        entries = json.loads(header)
        ends = [e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except Exception as trouble:  # any malformed header, whatever the reason
        return corrupt(
            f"a header that cannot be read ({trouble})",
            "JSON with shapes and offsets",
            f"corrupt; {again}",
        )
    if needed > size:
        lost = [
            n
            for n, e in entries.items()
            if n != "__metadata__" and 8 + length + e["data_offsets"][1] > size
        ]
        what = f"{len(lost)} of {len(ends)} tensors are cut off, the first is {lost[0]}"
        return corrupt(
            f"{size} bytes", f"{needed} bytes by its header", f"truncated: {what}; {again}"
        )
    if needed < size:
        return corrupt(
            f"{size} bytes",
            f"{needed} bytes by its header",
            f"{size - needed} bytes too many; {again}",
        )
    return corrupt(
        f"{type(error).__name__}: {error}", "", f"corrupt, or made by a newer format; {again}"
    )


def _error(
    summary: str, name: str, kind: str, got: str = "", expected: str = "", hint: str = ""
) -> SourceError:
    return SourceError(
        f"{summary} Nothing was written.", [Finding(name, kind, got, expected, hint)]
    )
