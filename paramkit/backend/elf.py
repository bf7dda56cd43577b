"""Whether a shared library is all there, told from its headers.

The dynamic loader maps a library by its headers. Where the file ends before they say, it maps memory
that has no content, and the process dies by SIGBUS at the first touch. A copy that was cut short, by a
full disk or a killed installation, is such a file.
"""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["cut_short"]

_LOAD = 1  # a segment that is mapped


def cut_short(path: Path) -> str:
    """What a library lacks, in one sentence; empty if nothing.

    A file of another format (no ELF, of another width or byte order) is left to the dynamic loader,
    which refuses it without touching it.

    Args:
        path: the library.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01":
            return ""
        needed = 64
        if size >= needed:
            (table,) = struct.unpack_from("<Q", head, 32)
            entry, count = struct.unpack_from("<HH", head, 54)
            needed = table + entry * count
        if size >= needed:
            file.seek(table)
            headers = file.read(entry * count)
            for at in range(0, len(headers) - 39, max(entry, 1)):
                kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", headers, at)
                if kind == _LOAD:
                    needed = max(needed, offset + length)
    return f"it ends after {size} bytes, and its headers tell of {needed}" if size < needed else ""
