"""Checkpoints of torch.save: `.pt`, `.pth`, `.bin`, `.ckpt`, `.pkl`.

They are pickles, and a pickle can run any code. So they are read with `weights_only=True`, which knows
tensors and plain containers and nothing else, and in no other way.

Such a file is a zip archive of one record for the pickle and one, not compressed, for each storage.
`open_stored` unpickles onto the meta device, where torch notes the offset of each storage's record instead
of reading it. The offsets are then checked against the archive's own directory.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Finding, SourceError
from .faults import AGAIN, look_alike, type_text
from .lazy import Lazy, Stored
from .mapping import NESTS, sift
from .reading import StoredFile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["open_mapped", "open_stored"]

# What trainers keep beside the weights. It may hold tensors, but not the model's.
_NOT_WEIGHTS = (
    "optimizer",
    "optim",
    "lr_scheduler",
    "scheduler",
    "scaler",
    "rng",
    "callbacks",
    "loops",
)


class _Elsewhere(Exception):
    """A file whose tensors cannot be located by offset: it is loaded into memory instead."""


def open_mapped(path: Path) -> dict[str, Tensor | Lazy]:
    """The tensors of a checkpoint as views of the memory-mapped file; in memory for the format before 1.6.

    Raises:
        SourceError: as `open_stored`.
    """
    file = StoredFile(path)
    _look(file)
    if not _is_zip(file):
        return _weights(path, _load(file, map_location="cpu"))
    return _weights(path, _load(file, map_location="cpu", mmap=True))


def open_stored(path: Path) -> dict[str, Tensor | Lazy]:
    """The tensors of a checkpoint as `Stored`; only its directory and its pickle are read.

    Layouts are kept: strides are those of the tensor that was saved. Tensors that shared their memory, and
    are the same view of it, have the same `location()`. Parameters come as plain tensors.

    Where torch does not tell offsets (before 2.13), and for files of the format before torch 1.6, of another
    byte order, with compressed records, or with sparse, quantized or conjugated tensors, the file is loaded
    into memory.

    Raises:
        SourceError: the file is missing, damaged, holds other objects than tensors in plain containers, or
            entries beside its weights. All of these entries are listed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.pt")
        ...     torch.save({"state_dict": {"w": torch.arange(6.0).view(2, 3).t()}, "epoch": 3}, path)
        ...     open_stored(path)
        {'w': Stored((3, 2), torch.float32, strides (1, 3))}
    """
    file = StoredFile(path)
    _look(file)
    try:
        return _located(file)
    except _Elsewhere:
        return _weights(path, _load(file, map_location="cpu"))


def _located(file: StoredFile) -> dict[str, Tensor | Lazy]:
    records = _records(file)
    try:
        loaded = _load(file, map_location="meta")
    except SourceError:
        raise _Elsewhere from None  # whatever it is, loading it says so better
    out: dict[str, Tensor | Lazy] = {}
    for name, tensor in _weights(file.path, loaded).items():
        assert isinstance(tensor, torch.Tensor)
        out[name] = _stored(file, tensor, records)
    file.check()  # what torch read by the path is what is open here
    return out


def _stored(file: StoredFile, tensor: Tensor, records: dict[int, int]) -> Stored:
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise _Elsewhere
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    record = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if record is None:
        raise _Elsewhere
    if not tensor.numel():
        return Stored(file, 0, shape, tensor.dtype, strides)
    begin = tensor.storage_offset() * tensor.dtype.itemsize
    if begin + Lazy(shape, tensor.dtype, strides).nbytes > records.get(record, -1):
        raise _Elsewhere
    return Stored(file, record + begin, shape, tensor.dtype, strides)


def _records(file: StoredFile) -> dict[int, int]:
    """Offset in the file -> bytes, of the storages in an archive of torch.save.

    Raises:
        _Elsewhere: no such archive, or one that torch did not write just so.
    """
    if not _is_zip(file):
        raise _Elsewhere
    records: dict[int, int] = {}
    keys: list[tuple[int, int]] = []
    try:
        with zipfile.ZipFile(file.path) as archive:
            for entry in archive.infolist():
                _, _, inner = entry.filename.partition("/")
                if inner == "byteorder" and archive.read(entry) != b"little":
                    raise _Elsewhere
                if not inner.startswith("data/"):
                    continue
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise _Elsewhere
                # The directory does not say how long the record's own header is.
                lead = file.bytes(entry.header_offset, 30)
                if lead[:4] != b"PK\x03\x04" or len(lead) < 30:
                    raise _Elsewhere
                extra = int.from_bytes(lead[26:28], "little") + int.from_bytes(
                    lead[28:30], "little"
                )
                begin = entry.header_offset + 30 + extra
                if begin + entry.file_size > file.size:
                    raise _Elsewhere
                if entry.file_size:
                    records[begin] = entry.file_size
                keys.append((begin, int(inner[5:])))
    except _Elsewhere:
        raise
    except (
        Exception
    ) as error:  # zipfile raises many types at a damaged archive, RuntimeError among them
        raise _Elsewhere from error
    # torch works offsets out from the order in which it writes. Another tool may have written another order.
    if [key for _, key in sorted(keys)] != list(range(len(keys))):
        raise _Elsewhere
    return records


def _is_zip(file: StoredFile) -> bool:
    return file.bytes(0, 4) == b"PK\x03\x04"


def _look(file: StoredFile) -> None:
    """Refuse what can be told by its first bytes."""
    if file.size == 0:
        raise file.fault("an empty file (0 bytes)")
    lead = file.bytes(0, 16)
    known = look_alike(lead)
    if known:
        raise file.fault(known[0], hint=known[1])
    if lead[8:9] == b"{" and int.from_bytes(lead[:8], "little") < file.size:
        raise file.fault(
            f"a safetensors file under the name of a {file.path.suffix} file",
            hint="rename it to .safetensors",
        )


def _load(file: StoredFile, **options: Any) -> Any:
    """torch.load of plain data, with one kind of error."""
    try:
        with warnings.catch_warnings():
            # On typed storages and the like: about torch's insides, not about the file.
            warnings.simplefilter("ignore")
            # Said, since torch may be set to map by default, and a map of a file that is cut ends the process.
            return torch.load(file.path, weights_only=True, **{"mmap": False, **options})
    except pickle.UnpicklingError as error:
        raise _refused(file, str(error)) from None
    except MemoryError:
        raise
    except (
        OSError
    ) as error:  # of the system, which says what it is about: no permission, too many open files
        raise file.system_fault(error) from None
    except Exception as error:  # torch raises whatever its insides raise at a damaged file
        text = str(error).partition("\n")[0].partition(" This is an internal miniz")[0]
        if "TorchScript" in text:
            raise file.fault(
                "a TorchScript archive, which holds code",
                "a state dict",
                "load it with torch.jit.load if you trust it, and pass its state_dict()",
            ) from None
        raise file.fault(
            f"{type(error).__name__}: {text[:300]}",
            "a checkpoint of torch.save",
            f"truncated, corrupt, or of another format; {AGAIN}",
        ) from None


def _refused(file: StoredFile, text: str) -> SourceError:
    """An error for a pickle with objects in it. Torch's own text recommends to load them all the same."""
    what = "objects other than tensors"
    for lead in ("Unsupported global: GLOBAL ", "Unsupported class ", "GLOBAL "):
        _, found, rest = text.partition(lead)
        if found and rest.split():
            what = f"objects that are no tensors ({rest.split()[0]})"
            break
    else:
        if "Unsupported operand" in text or "persistent_load" in text or not text:
            what = "no checkpoint of torch.save, or objects that are no tensors"
    return file.fault(
        what,
        "tensors by name",
        "refused: unpickling objects can run any code; "
        "where it was made, save model.state_dict() alone, best as .safetensors",
    )


# ---- what is in it -------------------------------------------------------------------------------


def _weights(path: Path, loaded: object) -> dict[str, Tensor | Lazy]:
    """The named tensors of what was in a file: all of it, or the one entry that holds a model's."""
    name = str(path)
    if not isinstance(loaded, Mapping):
        raise SourceError(
            "the source file holds no named tensors; nothing was written.",
            [Finding(name, "type", type_text(loaded), "a mapping from names to tensors")],
        )
    nests = [
        key for key in NESTS if isinstance(loaded.get(key), Mapping) and _has_tensors(loaded[key])
    ]
    if nests:
        beside = [
            key
            for key, value in loaded.items()
            if key not in nests and _has_tensors(value) and not _is_training_state(key)
        ]
        if len(nests) > 1 or beside:
            raise SourceError(
                f"{path} holds several sets of tensors, and it is not known which is meant; "
                "nothing was written.",
                [
                    Finding(
                        str(key),
                        "conflict",
                        "a tensor" if isinstance(loaded[key], torch.Tensor) else "tensors in it",
                        "",
                        f"to take it, load the file with torch.load(path, weights_only=True) and pass [{key!r}]",
                    )
                    for key in [*nests, *beside]
                ],
            )
    inner: Mapping[Any, Any] = loaded[nests[0]] if nests else loaded
    tensors, findings = sift(inner)
    if findings:
        where = f'the entry "{nests[0]}" of {path}' if nests else str(path)
        raise SourceError(
            f"{where} has {len(findings)} of {len(inner)} entries that are not named tensors; "
            "nothing was written.",
            findings,
        )
    return {key: value.detach() for key, value in tensors.items()}  # type: ignore[union-attr]


def _is_training_state(key: object) -> bool:
    return isinstance(key, str) and key.startswith(_NOT_WEIGHTS)


def _has_tensors(value: object) -> bool:
    """Whether there is a tensor in it, at any depth of plain containers."""
    stack, seen = [value], set()
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            return True
        if id(value) in seen:
            continue
        if isinstance(value, Mapping):
            seen.add(id(value))
            stack.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            seen.add(id(value))
            stack.extend(value)
    return False
