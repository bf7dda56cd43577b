"""What a source is, and which reader opens it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import torch

from ..errors import Finding, SourceError, suggest
from . import dcp, index, pickled, safetensors_file
from .faults import PICKLES, one_fault, type_text
from .mapping import open_mapping
from .module import module_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..typing import Source
    from .lazy import Lazy

    Opener = Callable[[Path], dict[str, Tensor | Lazy]]

__all__ = ["open_source"]

_TAKEN = (
    "an nn.Module, a mapping from names to tensors, the path of a .safetensors file, "
    "of a checkpoint of torch.save, of an index or of a folder (of files, or a checkpoint of "
    "torch.distributed.checkpoint), or a list of paths"
)
_INDEX = ".index.json"


@overload
def open_source(source: Source, *, mmap: Literal[True] = True) -> dict[str, Tensor]: ...
@overload
def open_source(source: Source, *, mmap: bool) -> dict[str, Tensor | Lazy]: ...
def open_source(
    source: Source, *, mmap: bool = True
) -> dict[str, Tensor | Lazy] | dict[str, Tensor]:
    """The named tensors of a source.

    Args:
        source: one of

            - an `nn.Module`: its parameters and persistent buffers, under every name they have;
            - a mapping from names to tensors (or to `Lazy` ones);
            - the path of a `.safetensors` file, or of a `.pt`, `.pth`, `.bin`, `.ckpt` or `.pkl` file
              of torch.save, which is read with `weights_only=True` and in no other way;
            - the path of an index (`*.index.json`), or of a folder: its index, or else its `.safetensors`
              files, or else its checkpoints of torch.save;
            - the path of a folder that `torch.distributed.checkpoint` (DCP) wrote, saved on any number of
              ranks in any sharding, or a `StorageReader` of DCP. Its tensors are whole ones; names of nested
              entries are joined by dots, and entries that are no tensors are left out: of
              `{"model": .., "optim": .., "step": 3}` the model is taken by
              `[Rule("model.{*p}", "{*p}"), Rule("optim.{*p}", None)]`;
            - a list of such paths, with names that differ.
        mmap: True: tensors of a file are views of the memory-mapped file. For a file on a local disk that
            nobody changes: where it is truncated meanwhile, the process dies by SIGBUS.
            False: they are `Stored`, and their bytes are read when they are asked for. The exceptions are
            in-memory tensors: files of torch.save in the format before 1.6, of another byte order, or
            with tensors that are not plainly strided.
            A checkpoint of DCP cannot be mapped: its tensors are `Lazy` either way. DCP loads whole chunks (what one
            rank saved of a tensor), so that memory is bounded by `staging` and the chunks of one tensor.

    Returns:
        name -> tensor on the CPU (a module's or mapping's: wherever it is), in the source's order. No data
        is copied, but for the exceptions above.

    Raises:
        SourceError: an object of another type, a mapping with values that are no tensors, or files that
            are missing, of another format, truncated, corrupt, at odds with their index, or that hold
            objects other than tensors. All problems are listed.

    Example:
        >>> import torch
        >>> open_source(torch.nn.Linear(3, 2))["weight"].shape
        torch.Size([2, 3])
        >>> import safetensors.torch, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"w": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        ...     open_source(folder, mmap=False)
        {'w': Stored((2, 3), torch.float32)}
    """
    if isinstance(source, torch.nn.Module):
        return {name: tensor for name, tensor, *_ in module_tensors(source)}
    if isinstance(source, Mapping):
        return open_mapping(source)

    def open_one(path: Path) -> dict[str, Tensor | Lazy]:
        return _open_path(path, mmap)

    if isinstance(source, (str, os.PathLike)):
        return open_one(Path(source))
    if isinstance(source, (list, tuple)):
        if not source:
            raise one_fault(
                "the source is an empty list.", "source", "type", "[]", "at least one path"
            )
        if all(isinstance(s, (str, os.PathLike)) for s in source):
            return open_files([Path(s) for s in source], open_one)
    if dcp.is_reader(source):
        return dcp.open_checkpoint(source)
    raise one_fault(
        "the source cannot be read.", "source", "type", got=type_text(source), expected=_TAKEN
    )


def open_files(paths: list[Path], open_one: Opener) -> dict[str, Tensor | Lazy]:
    """The tensors of several files together, or one error about all that is wrong with any of them."""
    tensors: dict[str, Tensor | Lazy] = {}
    origin: dict[str, Path] = {}
    findings: list[Finding] = []
    for path in paths:
        try:
            opened = open_one(path)
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


def _open_path(path: Path, mmap: bool) -> dict[str, Tensor | Lazy]:
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # no permission, a NUL, a name that is too long
        raise _unreachable(path, error) from error

    def open_one(path: Path) -> dict[str, Tensor | Lazy]:
        return _open_path(path, mmap)

    if is_folder and dcp.is_checkpoint(path):
        return dcp.open_checkpoint(path)
    if is_folder:
        found = index.choose(path)
        if isinstance(found, list):
            return open_files(found, open_one)
        return open_one(found)
    if is_file and path.name.endswith(_INDEX):
        return index.open_index(path, lambda p: open_file(p, mmap))
    return open_file(path, mmap)


def open_file(path: Path, mmap: bool) -> dict[str, Tensor | Lazy]:
    """The tensors of one file of weights, which may also be missing."""
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:
        raise _unreachable(path, error) from error
    if not is_file:
        raise _unusable(path)
    if path.suffix == ".safetensors":
        return safetensors_file.open_mapped(path) if mmap else safetensors_file.open_stored(path)
    if path.suffix in PICKLES:
        return pickled.open_mapped(path) if mmap else pickled.open_stored(path)
    raise _unusable(path)


def _unreachable(path: Path, error: Exception) -> SourceError:
    return one_fault(
        "the source cannot be looked at.",
        str(path),
        "file",
        str(error),
        "",
        "check its permissions",
    )


def _unusable(path: Path) -> SourceError:
    """Why a path cannot be opened at all."""
    name = str(path)
    try:
        if not path.exists():
            folder = path.parent
            if not folder.is_dir():
                hint = f"there is no folder {folder}"
            else:
                known = (".safetensors", ".json", *PICKLES)
                near = suggest(path.name, [p.name for p in folder.iterdir() if p.suffix in known])
                hint = (
                    f"did you mean {folder / near}?"
                    if near
                    else f"the folder {folder.resolve()} has no such file"
                )
            return one_fault(
                "the source file does not exist.", name, "file", "no such file", "", hint
            )
        if not path.is_file():
            return one_fault(
                "the source is no regular file.",
                name,
                "file",
                "a folder" if path.is_dir() else "not a regular file",
                "a file of weights",
            )
    except OSError as error:
        return _unreachable(path, error)
    hint = "convert it, or load it yourself and pass a mapping from names to tensors"
    got = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
    expected = f"a .safetensors, {', '.join(PICKLES)} or {_INDEX} file"
    return one_fault("the source file has another format.", name, "file", got, expected, hint)
