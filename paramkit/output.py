"""Writing a `.safetensors` file in place: its tensors are views of the file, and it appears whole or not at all.

The file has no name, or a temporary one, until everything in it is written. Its space on the disk is taken
before the first byte, so that a full disk is an error at the start and not a SIGBUS in the middle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import Finding, PlanError, dtype_text
from .sources.safetensors_file import DTYPES, MAX_HEADER

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

__all__ = ["SafetensorsOutput", "layout"]

_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
_ALIGNMENT = 8
_ZEROS = 1 << 20


class SafetensorsOutput:
    """A `.safetensors` file that is being written.

    Args:
        path: of the file to make. A file that is there is replaced at the end. Where it is a symbolic link,
            the file that it leads to is replaced.
        entries: (name, dtype, shape) of the tensors. In the file, those of wider elements come first, which
            aligns all of them, and the order is kept among those of one width.
        metadata: text by name, for the header; {"format": "pt"} if left out, as torch users expect.
        inputs: paths that are read meanwhile, and must not be replaced.

    Attributes:
        tensors: within the block, name -> CPU tensor of that dtype and shape, contiguous, zero, a view of
            the file. Do not use them after the block: a view keeps the file's memory mapped, no more.
        size: bytes of the whole file.

    Raises:
        PlanError: names that are there twice or are no text, dtypes that the format does not have, sizes
            that are no sizes, or a path that is one of the inputs; all of them are listed.
        OSError: on entering the block, the folder is missing or may not be written to, or the disk has no
            room for the whole file. On `commit`, the disk reports an error. No file is left behind.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/out.safetensors"
        ...     with SafetensorsOutput(path, [("w", torch.float32, (2, 3))]) as out:
        ...         _ = out.tensors["w"].fill_(0.5)
        ...         out.commit()
        ...     load_file(path)["w"].sum()
        tensor(3.)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Iterable[tuple[str, torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        *,
        inputs: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        self.path = Path(path)
        self._target = Path(
            os.path.realpath(self.path)
        )  # the link stays, and leads to the new file
        findings = self._path_findings(inputs)
        try:
            self._header, self._places = layout(
                entries, {"format": "pt"} if metadata is None else metadata
            )
        except PlanError as error:
            findings.extend(error.findings)
        if findings:
            raise PlanError(f"{self.path} cannot be written; nothing was written.", findings)
        data = sum(_nbytes(dtype, shape) for _, dtype, shape in self._places.values())
        self.size = len(self._header) + data
        self.tensors: dict[str, Tensor] = {}
        self._map: mmap.mmap | None = None
        self._fd = self._folder = -1
        self._name: str | None = None  # None while the file has no name
        self._done = False

    def __enter__(self) -> SafetensorsOutput:
        try:
            self._open()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()

    def trim(self) -> None:
        """Let go of the memory of what is written so far; the system writes it to the disk in its own time.

        The process's resident memory falls to what is touched after this. No value is lost, and `tensors`
        may be read and written on.
        """
        if self._map is not None:
            # Of a shared mapping of a file this drops the pages of the process, not those of the file.
            self._map.madvise(mmap.MADV_DONTNEED)

    def commit(self) -> None:
        """Put the file on the disk, and give it its name. Call it last in the block.

        Raises:
            OSError: the disk reports an error. Nothing is left behind, and what was at `path` is unchanged,
                unless it is the folder that cannot be put on the disk, after the file has its name.
            RuntimeError: outside of the block, or for the second time.
        """
        if self._map is None or self._done:
            raise RuntimeError("commit() belongs into the block, once, after everything is written")
        with self._full_disk():  # some file systems find out only now
            self._map.flush()
            os.fsync(self._fd)
        if self._name is None:
            name = self._name = (
                self._new_name()
            )  # before it is there: an interrupt may come between
            # With a folder given, Python calls linkat, which follows /proc's link to the file without a name.
            os.link(
                f"/proc/self/fd/{self._fd}",
                name,
                src_dir_fd=self._folder,
                dst_dir_fd=self._folder,
                follow_symlinks=True,
            )
        os.replace(self._name, self._target.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._name = None
        self._done = True
        os.fsync(self._folder)

    # ---- opening and closing ---------------------------------------------------------------------

    def _open(self) -> None:
        folder = self._target.parent
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._folder = os.open(folder, flags)
        self._fd = self._create()
        self._reserve()
        with self._full_disk():
            _write(self._fd, self._header, 0)
        self._map = mmap.mmap(self._fd, self.size)
        # Pages come one by one, as they are written. By default the system reads ahead what is only written, and
        # maps what lies around: runs of 1 KiB then cost 16 KiB of memory each, and whole tensors three times the time.
        self._map.madvise(mmap.MADV_RANDOM)
        for name, (offset, dtype, shape) in self._places.items():
            count = torch.Size(shape).numel()
            if count:
                flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
                self.tensors[name] = flat.view(shape)
            else:
                self.tensors[name] = torch.empty(shape, dtype=dtype)

    def _create(self) -> int:
        """A file without a name, which vanishes with the process, however it ends; or one with a name."""
        mode = 0o666  # less the umask
        flags = os.O_RDWR | os.O_CLOEXEC
        with contextlib.suppress(OSError):  # a file system that has no such files
            fd = os.open(".", flags | os.O_TMPFILE, mode, dir_fd=self._folder)
            if Path(f"/proc/self/fd/{fd}").exists():  # or it could not be named at the end
                return fd
            os.close(fd)
        self._name = self._new_name()
        return os.open(self._name, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=self._folder)

    def _new_name(self) -> str:
        # A file name has at most 255 bytes.
        stem = os.fsdecode(os.fsencode(self._target.name)[:200])
        return f".{stem}.{secrets.token_hex(6)}.tmp"

    def _reserve(self) -> None:
        """Take the whole file's room on the disk."""
        with self._full_disk():
            try:
                os.posix_fallocate(self._fd, 0, self.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                    raise
                # A file system that cannot: zeros take the room. A hole would not.
                zeros = bytes(min(_ZEROS, self.size))
                for at in range(0, self.size, _ZEROS):
                    _write(self._fd, zeros[: self.size - at], at)

    @contextlib.contextmanager
    def _full_disk(self):  # type: ignore[no-untyped-def]
        try:
            yield
        except OSError as error:
            why = {
                errno.ENOSPC: "the disk is full",
                errno.EDQUOT: "the disk quota is used up",
                errno.EFBIG: "the file is too large for the file system or for the limit (ulimit -f)",
            }.get(error.errno or 0)
            if why is None:
                raise
            room = os.fstatvfs(self._folder)
            raise OSError(
                error.errno,
                f"{why}: {self.size:,} bytes are needed, {room.f_bavail * room.f_frsize:,} are free "
                "in its folder; nothing was written",
                str(self.path),
            ) from None

    def _discard(self) -> None:
        """Close everything, and remove the file unless it has its final name."""
        self.tensors = {}
        # Not closed: a tensor holds the map, but would not keep it from being closed, and then point nowhere.
        self._map = None
        if self._name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._folder)
            self._name = None
        for fd in (self._fd, self._folder):
            if fd >= 0:
                os.close(fd)
        self._fd = self._folder = -1

    def _path_findings(self, inputs: Iterable[str | os.PathLike[str]]) -> list[Finding]:
        name = str(self.path)
        try:
            found = self._target.stat()
        except FileNotFoundError:
            return []
        if not stat.S_ISREG(found.st_mode):
            got = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            return [Finding(name, "file", got, "the path of a file to make")]
        for other in inputs:
            with contextlib.suppress(OSError):
                if os.path.samestat(found, os.stat(other)):  # noqa: PTH116
                    return [
                        Finding(
                            name, "conflict", f"the same file as the input {other}",
                            "another file", "write to another path, and rename it afterwards",
                        )
                    ]  # fmt: skip
        return []


def layout(
    entries: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, torch.dtype, tuple[int, ...]]]]:
    """The beginning of a `.safetensors` file, and where its tensors go.

    Args:
        entries: (name, dtype, shape).
        metadata: text by name.

    Returns:
        (the bytes up to the first tensor, name -> (offset in the file, dtype, shape)), names in the order
        given. The bytes are a multiple of 8, so that every tensor is aligned to its elements.

    Raises:
        PlanError: as `SafetensorsOutput`.

    Example:
        >>> head, places = layout([("a", torch.bool, (3,)), ("b", torch.int64, ())], {})
        >>> len(head) % 8, places["b"][0] - len(head), places["a"][0] - len(head)
        (0, 0, 8)
    """
    entries = list(entries)
    findings: list[Finding] = []
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, dtype, shape in entries:
        if not isinstance(name, str) or name == "__metadata__" or not _is_text(name):
            findings.append(Finding(repr(name), "type", "", "a name that the format can hold"))
            continue
        if name in shapes:
            findings.append(Finding(name, "conflict", "twice", "each name once"))
        if dtype not in _TAGS:
            expected = ", ".join(map(dtype_text, _TAGS))
            findings.append(Finding(name, "dtype", str(dtype), expected))
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            findings.append(Finding(name, "shape", str(tuple(shape)), "sizes"))
        shapes[name] = dtype, tuple(shape)
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str) and _is_text(key + value)):
            findings.append(Finding(f"metadata[{key!r}]", "type", repr(value)[:80], "text by name"))
    if findings:
        raise PlanError("the file cannot be laid out; nothing was written.", findings)

    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    offsets: dict[str, int] = {}
    for name, (dtype, sizes) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
        end = at + _nbytes(dtype, sizes)
        header[name] = {"dtype": _TAGS[dtype], "shape": list(sizes), "data_offsets": [at, end]}
        offsets[name], at = at, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise PlanError(
            "the file cannot be laid out; nothing was written.",
            [Finding("entries", "file", f"a header of {len(text)} bytes", f"at most {MAX_HEADER}")],
        )
    head = len(text).to_bytes(8, "little") + text
    return head, {
        name: (len(head) + offsets[name], dtype, sizes) for name, (dtype, sizes) in shapes.items()
    }


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
