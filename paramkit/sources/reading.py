"""Files read by offset, into memory that is there already.

`pread` and not a memory map: where a file is truncated while it is read, a map kills the process with
SIGBUS, and `pread` comes back short, which is an error that can be caught.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import SourceError
from .faults import one_fault, unreadable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StoredFile"]

# Warm 1 GiB file, two cores that memcpy 6.7 GB/s each (12.7 together): one thread reads 6.6 GB/s with
# blocks of 1 MiB or more, two read 12.4 to 12.6 with blocks of 1 to 16 MiB taken in turn (11.4 with 256 KiB).
BLOCK = 2 << 20
# Handing half to another thread costs about 60 us. Of 1 MiB two threads read 7.5 GB/s against 9.4 of one,
# of 2 MiB 9.8 against 8.9, of 4 MiB 12.2 against 9.2 (into staging memory that stays in the cache).
SPLIT = 2 << 20
# Gaps between ranges up to this size are read too, and thrown away: cheaper than a call for each range.
GAP = 4 << 10

_IOV_MAX = 1024  # Linux's, for one call
_waste = ctypes.create_string_buffer(GAP)
_WASTE = ctypes.addressof(_waste)

# (offset in the file, the pieces of memory (address, bytes) that are filled from there on, their bytes together)
_Run = tuple[int, list[tuple[int, int]], int]


class StoredFile:
    """A file that is opened once, read by offset from any thread, and closed when nobody needs it.

    Args:
        path: a regular file.

    Attributes:
        path: as given.
        size: bytes, when it was opened.
        identity: (device, inode), the same for every path of one file.

    Raises:
        SourceError: no regular file, or it cannot be opened.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkstemp()[1]
        >>> _ = open(path, "wb").write(b"weights!")
        >>> file, out = StoredFile(path), torch.empty(4, dtype=torch.uint8)
        >>> file.read(2, out)
        >>> bytes(out.tolist())
        b'ight'
        >>> _ = open(path, "wb").write(b"other")
        >>> try:
        ...     file.check()
        ... except SourceError as error:
        ...     print(error.summary)
        the source file is not what it was. Nothing was written.
        >>> os.remove(path)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # Non-blocking, so that a pipe in the place of a file is refused and not waited for.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError) as error:
            raise self._system_fault(error) from error
        self._close = weakref.finalize(self, os.close, self._fd)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            self._close()
            raise one_fault(
                "the source is no regular file.",
                str(path),
                "file",
                "a folder, a pipe or a device",
                "a file",
            )
        self.size = found.st_size
        self.identity = (found.st_dev, found.st_ino)
        self._changed = found.st_mtime_ns

    def check(self) -> None:
        """Make sure that the file is still what it was when it was opened.

        Notices another size or modification time, and another file under the path. A path that is gone
        is no matter: the open file is still there.

        Raises:
            SourceError: it is not.
        """
        found = os.fstat(self._fd)
        got = ""
        if found.st_size != self.size:
            got = f"{found.st_size} bytes"
        elif found.st_mtime_ns != self._changed:
            got = "written to since it was opened"
        else:
            try:
                now = self.path.stat()
            except OSError:
                return
            if (now.st_dev, now.st_ino) != self.identity:
                got = "another file under this path"
        if got:
            raise one_fault(
                "the source file is not what it was.",
                str(self.path),
                "file",
                got,
                f"the file of {self.size} bytes that was opened",
                "open it again once it is complete",
            )

    def read(self, offset: int, out: Tensor) -> None:
        """Read `len(out)` bytes from `offset`. Large ranges are read by several threads.

        Args:
            offset: of the first byte in the file, >= 0.
            out: CPU tensor, uint8, 1-d, contiguous; every byte of it is written.

        Raises:
            SourceError: the file ends before that, or the system reports an error. `out` holds anything then.
            ValueError: another kind of `out`.
        """
        self.read_many([(offset, out)])

    def read_many(self, ranges: Iterable[tuple[int, Tensor]]) -> None:
        """Read many ranges, those that follow each other (but for small gaps) by one call.

        Args:
            ranges: (offset in the file, uint8 CPU tensor), as for `read`, in any order.

        Raises:
            SourceError, ValueError: as `read`.
        """
        ranges = list(ranges)  # which holds the memory until it is filled
        runs = _merge([(offset, _address(out), len(out)) for offset, out in ranges])
        jobs = [job for run in runs for job in _blocks(run)]
        if len(jobs) > 1 and sum(run[2] for run in runs) >= SPLIT:
            self._read_in_turn(jobs)
        else:
            for job in jobs:
                self._read_run(job)

    def bytes(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`, fewer at the end of the file."""
        parts = []
        try:
            while length > 0:
                part = os.pread(self._fd, min(length, 1 << 30), offset)
                if not part:
                    break
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        except OSError as error:
            raise self._system_fault(error) from error
        return b"".join(parts)

    def fault(self, got: str, expected: str = "", hint: str = "") -> SourceError:
        """An error about this file's content."""
        return unreadable(self.path, got, expected, *([hint] if hint else []))

    def __repr__(self) -> str:
        return f"StoredFile({str(self.path)!r}, {self.size} bytes)"

    def _read_in_turn(self, jobs: Sequence[_Run]) -> None:
        """Let this thread and helpers take blocks until none is left; the first error is raised."""
        rest = iter(jobs)
        lock = threading.Lock()
        stop = False

        def work() -> None:
            nonlocal stop
            try:
                while not stop:
                    with lock:
                        job = next(rest, None)
                    if job is None:
                        return
                    self._read_run(job)
            except BaseException:
                stop = True
                raise

        futures = _help(work, min(_helpers(), len(jobs) - 1))
        try:
            work()
        finally:
            # Also on an interrupt: nobody may write into the caller's memory after this has returned.
            stop = True
            started = [future for future in futures if not future.cancel()]
            wait(started)
        for future in started:
            future.result()

    def _read_run(self, run: _Run) -> None:
        offset, pieces, left = run
        at = 0
        while left:
            some = [_buffer(*piece) for piece in pieces[at : at + _IOV_MAX]]
            try:
                count = os.preadv(self._fd, some, offset)
            except OSError as error:
                raise self._system_fault(error) from error
            if count == 0:
                raise self.fault(
                    f"its end at byte {offset}",
                    f"{left} bytes more",
                    "truncated while it was read, or by an interrupted download; open it again once it is complete",
                )
            offset, left = offset + count, left - count
            while count:
                address, length = pieces[at]
                if count < length:
                    pieces = [(address + count, length - count), *pieces[at + 1 :]]
                    at = 0
                    break
                count -= length
                at += 1

    def _system_fault(self, error: Exception) -> SourceError:
        hint = "check its permissions"
        number = getattr(error, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE):
            hint = "raise the limit of open files (ulimit -n)"
        elif number in (errno.EIO, errno.ESTALE):
            hint = "check the disk or the network"
        return one_fault(
            "the source file cannot be read.", str(self.path), "file", str(error), "", hint
        )


def _address(out: Tensor) -> int:
    if (
        out.dtype != torch.uint8
        or out.dim() != 1
        or not out.is_cpu
        or not out.is_contiguous()
        or type(out) is not torch.Tensor
    ):
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, "
            "expected a contiguous 1-d torch.uint8 tensor on the CPU"
        )
    return out.data_ptr()


def _buffer(address: int, length: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * length).from_address(address)


def _merge(ranges: list[tuple[int, int, int]]) -> list[_Run]:
    """Ranges (offset, address, bytes) as runs in file order.

    What follows each other in the file and in memory becomes one piece. A range that overlaps the one
    before starts a run of its own.
    """
    runs: list[_Run] = []
    pieces: list[tuple[int, int]] = []
    start = end = behind = -1  # of the run in the file, and the address behind its last piece
    ranges.sort()
    for offset, address, length in ranges:
        if not length:
            continue
        gap = offset - end
        if pieces and gap == 0 and address == behind:
            first, before = pieces[-1]
            pieces[-1] = first, before + length
        elif pieces and 0 <= gap <= GAP:
            if gap:
                pieces.append((_WASTE, gap))
            pieces.append((address, length))
        else:
            if pieces:
                runs.append((start, pieces, end - start))
            start, pieces = offset, [(address, length)]
        end, behind = offset + length, address + length
    if pieces:
        runs.append((start, pieces, end - start))
    return runs


def _blocks(run: _Run) -> list[_Run]:
    """A run in blocks of about `BLOCK` bytes and at most IOV_MAX pieces."""
    offset, pieces, length = run
    if length < SPLIT and len(pieces) <= _IOV_MAX:
        return [run]
    blocks: list[_Run] = []
    current: list[tuple[int, int]] = []
    size = 0
    for address, left in pieces:
        while left:
            part = min(left, BLOCK - size)
            current.append((address, part))
            size, address, left = size + part, address + part, left - part
            if size == BLOCK or len(current) == _IOV_MAX:
                blocks.append((offset, current, size))
                offset, current, size = offset + size, [], 0
    if current:
        blocks.append((offset, current, size))
    return blocks


# ---- helpers -------------------------------------------------------------------------------------

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _helpers() -> int:
    """How many threads help the one that reads: memory is busy with few."""
    return min(4, len(os.sched_getaffinity(0))) - 1


def _help(work: object, count: int) -> list[Future[None]]:
    global _pool
    if count < 1:
        return []
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(3, "paramkit-read")
        pool = _pool
    try:
        return [pool.submit(work) for _ in range(count)]  # type: ignore[arg-type]
    except RuntimeError:  # the interpreter is on its way out: no new threads, and none are needed
        return []


def _forget() -> None:
    """After a fork the threads of the pool exist in the parent alone."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
