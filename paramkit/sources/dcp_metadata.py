"""The metadata of a checkpoint of `torch.distributed.checkpoint`: a pickle, read with a list of what may be in it."""

from __future__ import annotations

import io
import pathlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from ..errors import SourceError
from .faults import AGAIN, one_fault, type_text, unreadable
from .reading import StoredFile

__all__ = ["METADATA", "ask_reader", "bad_metadata", "name_of", "open_folder"]

METADATA = ".metadata"


def open_folder(folder: Path) -> tuple[Any, Any]:
    path = folder / METADATA
    if not path.is_file():
        some = any(folder.glob(f"__*{METADATA}"))
        raise one_fault(
            "the source is a checkpoint of torch.distributed.checkpoint without metadata.",
            str(path),
            "file",
            "no such file",
            "written last, once all ranks have saved",
            "saved with use_collectives=False: each rank's part stands alone"
            if some
            else f"saving was cut off, or is not over yet; otherwise {AGAIN}",
        )
    file = StoredFile(path)
    raw = file.bytes(0, file.size)
    file.check()
    try:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import Metadata
    except Exception as error:
        raise unreadable(folder, f"{type(error).__name__}: {error}", "", _NEEDS) from error
    try:
        metadata = _Unpickler(io.BytesIO(raw)).load()
    except _Refused as error:
        raise file.fault(
            f"objects that DCP itself does not put there ({error})",
            "metadata of DCP",
            "refused: unpickling objects can run any code; if you trust it, pass "
            "torch.distributed.checkpoint.FileSystemReader(path) as the source",
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        raise bad_metadata(str(path), error) from error
    if not isinstance(metadata, Metadata):
        raise file.fault(type_text(metadata), "metadata of torch.distributed.checkpoint")
    return FileSystemReader(folder), metadata


_NEEDS = "a torch built with torch.distributed is needed to read it"


def ask_reader(reader: Any) -> Any:
    try:
        return reader.read_metadata()
    except MemoryError:
        raise
    except Exception as error:
        raise bad_metadata(name_of(reader), error) from error


def bad_metadata(name: str, error: Exception) -> SourceError:
    text = str(error).partition("\n")[0][:300]
    return unreadable(
        name,
        f"metadata that cannot be read ({type(error).__name__}: {text})",
        "metadata of torch.distributed.checkpoint",
        f"truncated, corrupt, or of a newer torch; {AGAIN}",
    )


class _Refused(Exception):
    """A global that metadata has no business with."""


# What the pickles of torch 2.1 to 2.13 name, beside dtypes.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return pathlib.PurePath  # of any system and any Python; nobody opens it
        raise _Refused(f"{module}.{name}")


def name_of(reader: Any) -> str:
    for attribute in ("path", "checkpoint_id"):
        try:
            found = getattr(reader, attribute, None)
        except Exception:
            found = None
        if found:
            return str(found)
    return type(reader).__name__
