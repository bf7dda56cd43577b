"""The files behind a source, and the text that they carry beside their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..sources import Stored, StoredFile
from ..sources.dcp import Checkpoint, Chunk, Chunked, is_checkpoint
from ..sources.index import choose
from ..sources.safetensors_file import read_header

__all__ = ["checkpoints", "files_of", "metadata_of", "stored_files"]


def stored_files(tensors: Mapping[str, Any]) -> list[StoredFile]:
    """The open files that tensors lie in, each once, in the order of the tensors."""
    found: dict[object, StoredFile] = {}
    for tensor in tensors.values():
        if isinstance(tensor, Stored):
            found.setdefault(tensor.file.identity, tensor.file)
    return list(found.values())


def checkpoints(tensors: Mapping[str, Any]) -> list[Checkpoint]:
    """The checkpoints of `torch.distributed.checkpoint` that tensors are of, each once."""
    found = (t.file for t in tensors.values() if isinstance(t, (Chunk, Chunked)))
    return list(dict.fromkeys(found))


def files_of(path: Path, tensors: Mapping[str, Any]) -> list[Path]:
    """Every file that a source was read from.

    Args:
        path: what was opened: a file, an index or a folder.
        tensors: what was in it.
    """
    found = [file.path for file in stored_files(tensors)]
    found += [own for checkpoint in checkpoints(tensors) for own in checkpoint.paths]
    if found and path.is_dir() and is_checkpoint(path):
        return found
    chosen = choose(path) if path.is_dir() else path
    found += chosen if isinstance(chosen, list) else [chosen]
    return list(dict.fromkeys(found))


def metadata_of(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of `.safetensors` files: what all of those that say something agree on.

    Returns:
        text -> text; empty for other formats.
    """
    merged: dict[str, str] = {}
    disputed = set()
    for file in stored_files(tensors):
        if file.path.suffix != ".safetensors":
            continue
        for key, value in read_header(file).metadata.items():
            if merged.setdefault(key, value) != value:
                disputed.add(key)
    return {key: value for key, value in merged.items() if key not in disputed}
