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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..backend import active
from ..errors import SourceError
from .faults import one_fault, unreadable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GAP", "Range", "StoredFile"]

# Warm 1 GiB file, two cores that memcpy 6.7 GB/s each (12.7 together): one thread reads 6.6 GB/s with
# blocks of 1 MiB or more, two read 12.4 to 12.6 with blocks of 1 to 16 MiB taken in turn (11.4 with 256 KiB).
BLOCK = 2 << 20
# Handing half to another thread costs about 60 us. Of 1 MiB two threads read 7.5 GB/s against 9.4 of one,
# of 2 MiB 9.8 against 8.9, of 4 MiB 12.2 against 9.2 (into staging memory that stays in the cache).
SPLIT = 2 << 20
# Shorter gaps between ranges are read too, and thrown away: cheaper than a call for each range. From a warm file
# (one thread, C++) a call costs 0.2 to 0.3 us more than reading on, and 1 KiB of gap 0.1: with gaps of 2.5 KiB
# both take the same time. The limit is lower, since what is read along is read by another rank as well; at
# most 0.2 us a row are lost by it. From a disk the system reads pages of 4 KiB anyway.
GAP = 1 << 10

_ROWS = 1 << 14  # at most in one block
_IOV_MAX = 1024  # Linux's, for one call
_waste = ctypes.create_string_buffer(GAP)
_WASTE = ctypes.addressof(_waste)

# (offset in the file, where it goes: uint8, 1-d), or (offset of the first row, where the rows go: uint8, 2-d, bytes
# from one row to the next in the file).
Range = tuple[int, torch.Tensor] | tuple[int, torch.Tensor, int]

# (offset in the file, the pieces of memory (address, bytes) that are filled from there on, their bytes together)
_Run = tuple[int, list[tuple[int, int]], int]


class _Rows(NamedTuple):
    """Row k goes from `offset + k * step` of the file to `address + k * pitch`."""

    offset: int
    step: int
    rows: int
    row_bytes: int
    address: int
    pitch: int

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


class StoredFile:
    """A file that is opened once, read by offset from any thread, and closed when nobody needs it.

    Args:
        path: a regular file.

    Attributes:
        path: as given.
        size: bytes, when it was opened.
        identity: (device, inode), the same for every path of one file.
        bytes_read: bytes that `read` and `read_many` got from the file so far, by all threads, gaps that were
            read along included; those of `bytes` (headers) not.

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
            raise self.system_fault(error) from error
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
        self.bytes_read = 0
        self._counting = threading.Lock()

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

    def read_many(self, ranges: Iterable[Range]) -> None:
        """Read many ranges, those that follow each other (but for gaps of less than `GAP`) by one call.

        Args:
            ranges: (offset in the file, uint8 CPU tensor), as for `read`, in any order. Or rows: (offset of the
                first row, uint8 CPU tensor [rows, bytes of a row] whose rows are contiguous, bytes from the
                beginning of a row to that of the next one in the file). Nothing between rows is read.

        Raises:
            SourceError, ValueError: as `read`.

        Example: bytes 1 and 2 of each four.

        >>> import tempfile
        >>> path = tempfile.mkstemp()[1]
        >>> _ = open(path, "wb").write(b"a12.b34.c56.")
        >>> file, out = StoredFile(path), torch.empty(3, 2, dtype=torch.uint8)
        >>> file.read_many([(1, out, 4)])
        >>> bytes(out.flatten().tolist()), file.bytes_read
        (b'123456', 6)
        >>> os.remove(path)
        """
        ranges = list(ranges)  # which holds the memory until it is filled
        flat: list[tuple[int, int, int]] = []
        rows: list[_Rows] = []
        for offset, out, *step in ranges:
            if step:
                some = _rows_of(offset, step[0], out)
                if some.rows == 1 or some.row_bytes == some.step == some.pitch:
                    flat.append((offset, some.address, some.bytes))
                elif some.bytes:
                    rows.append(some)
            else:
                flat.append((offset, _address(out), len(out)))
        jobs: list[_Run | _Rows] = [job for run in _merge(flat) for job in _blocks(run)]
        jobs += [job for some in rows for job in _row_blocks(some)]
        if rows:
            jobs.sort(key=lambda job: job[0])
        if len(jobs) > 1 and sum(_bytes(job) for job in jobs) >= SPLIT:
            self._read_in_turn(jobs)
        else:
            for job in jobs:
                self._read_job(job)

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
            raise self.system_fault(error) from error
        return b"".join(parts)

    def fault(self, got: str, expected: str = "", hint: str = "") -> SourceError:
        """An error about this file's content."""
        return unreadable(self.path, got, expected, *([hint] if hint else []))

    def __repr__(self) -> str:
        return f"StoredFile({str(self.path)!r}, {self.size} bytes)"

    def _read_in_turn(self, jobs: Sequence[_Run | _Rows]) -> None:
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
                    self._read_job(job)
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

    def _read_job(self, job: _Run | _Rows) -> None:
        if not isinstance(job, _Rows):
            self._read_run(job)
            return
        compiled: Any = getattr(active(), "read_rows", None)
        if compiled is not None:
            self._read_compiled(compiled, job)
        elif job.step == job.row_bytes:
            pieces = [(job.address + k * job.pitch, job.row_bytes) for k in range(job.rows)]
            self._read_run((job.offset, pieces, job.bytes))
        else:
            self._read_rows(job)

    def _read_rows(self, job: _Rows) -> None:
        """One call for each row. Python takes 1.4 us for it."""
        offset, step, rows, each, address, pitch = job
        memory = memoryview(_buffer(address, (rows - 1) * pitch + each))
        done = 0
        for at in range(0, rows * pitch, pitch):
            try:
                count = os.preadv(self._fd, [memory[at : at + each]], offset)
            except OSError as error:
                self._count(done)
                raise self.system_fault(error) from error
            done += count
            if count < each:
                self._count(done)
                done = 0
                rest = [(address + at + count, each - count)]
                self._read_run((offset + count, rest, each - count))
            offset += step
        self._count(done)

    def _read_compiled(self, read_rows: Any, job: _Rows) -> None:
        try:
            count = read_rows(self._fd, *job)
        except OSError as error:
            raise self.system_fault(error) from error
        self._count(count)
        if count < job.bytes:
            row, within = divmod(count, job.row_bytes)
            in_a_row = job.step == job.row_bytes
            left = job.bytes - count if in_a_row else job.row_bytes - within
            raise self._ended(job.offset + row * job.step + within, left)

    def _count(self, count: int) -> None:
        with self._counting:
            self.bytes_read += count

    def _ended(self, offset: int, left: int) -> SourceError:
        return self.fault(
            f"its end at byte {offset}",
            f"{left} bytes more",
            "truncated while it was read, or by an interrupted download; open it again once it is complete",
        )

    def _read_run(self, run: _Run) -> None:
        offset, pieces, left = run
        at = 0
        while left:
            some = [_buffer(*piece) for piece in pieces[at : at + _IOV_MAX]]
            try:
                count = os.preadv(self._fd, some, offset)
            except OSError as error:
                raise self.system_fault(error) from error
            if count == 0:
                raise self._ended(offset, left)
            self._count(count)
            offset, left = offset + count, left - count
            while count:
                address, length = pieces[at]
                if count < length:
                    pieces = [(address + count, length - count), *pieces[at + 1 :]]
                    at = 0
                    break
                count -= length
                at += 1

    def system_fault(self, error: Exception) -> SourceError:
        """What the system says about this file, as an error of ours."""
        hint = "check its permissions"
        number = getattr(error, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE):
            hint = "raise the limit of open files (ulimit -n)"
        elif number in (errno.EIO, errno.ESTALE):
            hint = "check the disk or the network"
        return one_fault(
            "the source file cannot be read.", str(self.path), "file", str(error), "", hint
        )


def _rows_of(offset: int, step: int, out: Tensor) -> _Rows:
    if (
        out.dtype != torch.uint8
        or out.dim() != 2
        or not out.is_cpu
        or (out.shape[1] > 1 and out.stride(1) != 1)
        or (out.shape[0] > 1 and out.stride(0) < out.shape[1])
        or type(out) is not torch.Tensor
    ):
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, "
            "expected a 2-d torch.uint8 tensor of contiguous rows on the CPU"
        )
    return _Rows(offset, step, out.shape[0], out.shape[1], out.data_ptr(), out.stride(0))


def _row_blocks(rows: _Rows) -> list[_Run | _Rows]:
    """Rows in blocks of about `BLOCK` bytes, and not so many that an interrupt would wait for long."""
    each = rows.row_bytes
    if each >= BLOCK:
        runs: list[_Run] = [
            (rows.offset + k * rows.step, [(rows.address + k * rows.pitch, each)], each)
            for k in range(rows.rows)
        ]
        return [block for run in runs for block in _blocks(run)]
    most = min(BLOCK // each, _ROWS)
    return [
        rows._replace(
            offset=rows.offset + k * rows.step,
            address=rows.address + k * rows.pitch,
            rows=min(most, rows.rows - k),
        )
        for k in range(0, rows.rows, most)
    ]


def _bytes(job: _Run | _Rows) -> int:
    return job.bytes if isinstance(job, _Rows) else job[2]


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
        elif pieces and 0 <= gap < GAP:
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
