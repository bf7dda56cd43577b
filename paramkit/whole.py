"""Small text files that are replaced whole: what was there stays until the new text is on the disk."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8). Where it is a symbolic link, the file that it leads to is replaced; its mode is kept.

    Raises:
        OSError: it cannot be written. What was at `path` is unchanged, and nothing else is left behind.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.txt")
        >>> write_whole(path, "one")
        >>> write_whole(path, "two")
        >>> path.read_text(), [found.name for found in path.parent.iterdir()]
        ('two', ['a.txt'])
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # a pipe, say: there is nothing to be kept
        target.write_text(text, encoding="utf-8")
        return
    # A file name has at most 255 bytes.
    stem = os.fsdecode(os.fsencode(target.name)[:200])
    temporary = target.with_name(f".{stem}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
