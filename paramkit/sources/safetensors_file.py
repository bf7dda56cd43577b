"""`.safetensors` files: a header of names, dtypes, shapes and offsets, then the bytes of the tensors.

The header is read and checked here, as strictly as the safetensors library does or more so: what it
refuses is refused, and also duplicate names, fields that the format does not have, and shapes that no
tensor can have. The library's own reader is used for memory-mapped tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SourceError
from . import strict_json
from .faults import AGAIN, look_alike, unreadable
from .lazy import Stored
from .reading import StoredFile

if TYPE_CHECKING:
    from torch import Tensor

    from .lazy import Lazy

__all__ = ["DTYPES", "MAX_HEADER", "Header", "open_mapped", "open_stored", "read_header"]

DTYPES: dict[str, torch.dtype] = {
    tag: getattr(torch, name)
    for tag, name in {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "C64": "complex64",
        "F64": "float64",
        "I64": "int64",
        "U64": "uint64",
    }.items()
    if hasattr(torch, name)
}
# Of the format, but with elements that share bytes.
_PARTS_OF_BYTES = ("F4", "F6_E2M3", "F6_E3M2")
MAX_HEADER = 100_000_000  # the library's limit, in bytes
MAX_DIMS = 64  # torch's, for most operations
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        tensors: name -> (dtype, shape, offset of its first byte in the file), in the header's order.
        metadata: text -> text.
        data: offset of the first tensor's first byte in the file.
    """

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
    metadata: dict[str, str]
    data: int


class _Malformed(ValueError):
    """Something in a header, as (got, expected)."""

    def __init__(self, got: str, expected: str = "") -> None:
        super().__init__(got)
        self.expected = expected


def open_stored(path: Path) -> dict[str, Tensor | Lazy]:
    """The tensors of a `.safetensors` file as `Stored`; only the header is read.

    Raises:
        SourceError: the file is missing, truncated or corrupt.

    Example:
        >>> import safetensors.torch, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.safetensors")
        ...     safetensors.torch.save_file({"w": torch.ones(3)}, path)
        ...     tensor = open_stored(path)["w"]
        >>> tensor.load()  # the file is gone by name, but still open
        tensor([1., 1., 1.])
    """
    file = StoredFile(path)
    return {
        name: Stored(file, offset, shape, dtype)
        for name, (dtype, shape, offset) in read_header(file).tensors.items()
    }


def open_mapped(path: Path) -> dict[str, Tensor | Lazy]:
    """The tensors of a `.safetensors` file as views of the memory-mapped file.

    Raises:
        SourceError: the file is missing, truncated or corrupt.
    """
    from safetensors import safe_open

    names = read_header(StoredFile(path)).tensors
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the reader's own errors are of several types and say little
        raise unreadable(
            path, f"{type(error).__name__}: {error}", "", f"changed meanwhile, or corrupt; {AGAIN}"
        ) from error


def read_header(file: StoredFile) -> Header:
    """Read and check the header of a `.safetensors` file.

    Raises:
        SourceError: it is no header, or not the one of this file.
    """
    size = file.size
    if size == 0:
        raise file.fault("an empty file (0 bytes)")
    lead = file.bytes(0, 8)
    if len(lead) < 8:
        raise file.fault(f"{size} bytes", "at least 8, the length of the header")
    length = int.from_bytes(lead, "little")
    if length > size - 8:
        # Not before this: the length of a header may well begin with the byte of a "<".
        raise _not_this_format(file, lead) or file.fault(
            f"a header of {length} bytes announced in a file of {size}",
            "a header within the file",
            f"truncated in the header, or corrupt; {AGAIN}",
        )
    if length > MAX_HEADER:
        raise file.fault(
            f"a header of {length} bytes", f"at most {MAX_HEADER}", f"corrupt; {AGAIN}"
        )
    raw = file.bytes(8, length)
    try:
        entries, metadata = _parse(raw)
        ends = {name: _check_entry(name, entry) for name, entry in entries.items()}
    except _Malformed as trouble:
        raise _header_fault(file, str(trouble), trouble.expected) from None
    except ValueError as trouble:  # of JSON, of UTF-8, of numbers with thousands of digits
        raise _header_fault(file, str(trouble)) from None
    _check_cover(file, 8 + length, ends)
    return Header(
        {
            name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + ends[name][0])
            for name, entry in entries.items()
        },
        metadata,
        8 + length,
    )


def _not_this_format(file: StoredFile, lead: bytes) -> SourceError | None:
    known = look_alike(lead)
    if known:
        return file.fault(known[0], hint=known[1])
    if lead[:4] == b"PK\x03\x04" or lead[:1] == b"\x80":
        return file.fault("a pickled checkpoint under a .safetensors name", hint="rename it to .pt")
    return None


def _header_fault(file: StoredFile, what: str, expected: str = "") -> SourceError:
    what = what if len(what) <= 300 else what[:300] + ".."
    return file.fault(
        f"a header that cannot be read ({what})",
        expected or "JSON with shapes and offsets",
        f"corrupt, or made by a newer format; {AGAIN}",
    )


def _parse(raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    if not raw.startswith(b"{"):
        raise _Malformed(f"it begins with {raw[:8]!r}", "JSON that begins with {")
    entries = strict_json.parse(raw)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Malformed("__metadata__ with something else than text", "text by name")
    return entries, metadata


def _check_entry(name: str, entry: object) -> tuple[int, int]:
    """Check one tensor by itself. Returns its data offsets."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise _Malformed(f"tensor {name!r} is described by {got}", "dtype, shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(tag, str) or tag not in DTYPES:
        if tag in _PARTS_OF_BYTES:
            raise _Malformed(
                f"tensor {name!r} has dtype {tag}, elements that share bytes",
                f"one of {', '.join(DTYPES)}",
            )
        raise _Malformed(f"tensor {name!r} has dtype {tag!r}", f"one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _Malformed(f"tensor {name!r} has shape {shape}", "a list of sizes")
    if not isinstance(offsets, list) or not all(type(n) is int and n >= 0 for n in offsets):
        raise _Malformed(f"tensor {name!r} has data_offsets {offsets}", "[begin, end]")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Malformed(f"tensor {name!r} has data_offsets {offsets}", "[begin, end]")
    if len(shape) > MAX_DIMS:
        raise _Malformed(f"tensor {name!r} has {len(shape)} axes", f"at most {MAX_DIMS}")
    # Also where a size is 0: strides are the products of the others.
    numel, reach = 1, DTYPES[tag].itemsize
    for n in shape:
        numel *= n
        reach *= max(n, 1)
    if reach >= 1 << 63:
        raise _Malformed(f"tensor {name!r} has shape {shape}", "sizes that memory can have")
    nbytes = numel * DTYPES[tag].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _Malformed(
            f"tensor {name!r} has data_offsets {offsets}, {offsets[1] - offsets[0]} bytes",
            f"{nbytes} bytes for {tag} of shape {shape}",
        )
    return offsets[0], offsets[1]


def _check_cover(file: StoredFile, data: int, ends: dict[str, tuple[int, int]]) -> None:
    """The tensors must follow each other without gaps, up to the end of the file."""
    size = file.size
    needed = data + max((end for _, end in ends.values()), default=0)
    if needed > size:
        lost = [name for name, (_, end) in ends.items() if data + end > size]
        what = f"{len(lost)} of {len(ends)} tensors are cut off, the first is {lost[0]}"
        raise file.fault(
            f"{size} bytes", f"{needed} bytes by its header", f"truncated: {what}; {AGAIN}"
        )
    at = 0
    for name, (begin, end) in sorted(ends.items(), key=lambda item: item[1]):
        if begin != at:
            raise _header_fault(
                file,
                f"tensor {name!r} begins at byte {begin} of the data",
                f"it to begin at {at}, where the one before ends",
            )
        at = end
    if needed < size:
        raise file.fault(
            f"{size} bytes",
            f"{needed} bytes by its header",
            f"{size - needed} bytes too many; {AGAIN}",
        )
