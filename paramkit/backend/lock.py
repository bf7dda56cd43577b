"""One build at a time in a folder, and its result put in place in one step.

setup.py loads this file by path, before paramkit or torch can be imported, so it imports nothing
but the standard library.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold a folder's lock; make the folder if there is none.

    The kernel drops the lock when the process ends, however it ends, so it is never stale: the file
    that stays behind means nothing. Programs that the process starts do not inherit it.

    Args:
        folder: what is locked; gets a file ``.lock``.
        say: told that another process has the lock, before waiting for it.

    Raises:
        OSError: the folder or the file cannot be made, or the file system has no locks.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is building; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def exchange(new: Path, old: Path) -> None:
    """Put a folder in the place of what is there, a folder or a file, in one step where the system can.

    Where it cannot (some network file systems), there is nothing for a moment.

    Args:
        new: the folder; has the old one's content afterwards, or is gone.
        old: its place, on the same file system; there may be nothing.

    Raises:
        OSError: it cannot be done.
    """
    if not os.path.lexists(old):
        new.replace(old)
        return
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:  # a C library without it
        done = False
    else:
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        done = renameat2(here, os.fsencode(new), here, os.fsencode(old), swap) == 0
    if not done:
        aside = new.with_name(f"{new.name}.old")
        old.replace(aside)
        new.replace(old)
