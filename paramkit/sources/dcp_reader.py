"""Chunks of a checkpoint of `torch.distributed.checkpoint`, read by its own reader, each once."""

from __future__ import annotations

import io
import os
import pathlib
import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Finding, SourceError
from .dcp_metadata import METADATA, bad_metadata, name_of
from .faults import AGAIN, one_fault

if TYPE_CHECKING:
    from torch import Tensor

    from .dcp import Chunk

__all__ = ["Asked", "Checkpoint"]

# Chunks that are wanted in part are loaded together up to so many bytes: a call opens each file again.
BATCH_BYTES = 32 << 20

# (chunk, first byte, one behind the last byte, where they go)
Asked = tuple["Chunk", int, int, "Tensor"]


@dataclass
class _Held:
    """A chunk in memory that is being read in parts.

    Attributes:
        tensor: of the chunk's shape, contiguous.
        left: bytes that nobody has asked for yet.
        thread: who asked last.
    """

    tensor: Tensor
    left: int
    thread: int


class Checkpoint:
    """A reader of DCP, and the chunks that are being read in part.

    A chunk that is read whole goes straight to where it belongs. One that is read in part is loaded once and
    held until all of its bytes were asked for, until its thread turns to another tensor, or until the pass
    over the source is over (`check`). So what is in memory at once is, beside the caller's own: the chunk
    that the reader is loading, up to `BATCH_BYTES` of small chunks, and of each thread the chunks of one tensor
    that it has read in part.

    Args:
        reader: a `StorageReader`.
        metadata: what it said.

    Attributes:
        name: the folder, or what else the reader calls the checkpoint.
        identity: equal for checkpoints that are the same files.
        others: names of entries that are no tensors.
        paths: local files that are read, the metadata first; empty where they lie elsewhere.
    """

    def __init__(self, reader: Any, metadata: Any) -> None:
        self._reader = reader
        self.name = name_of(reader)
        self._places: Any = getattr(metadata, "storage_data", None)
        self._lock = threading.RLock()
        self._held: dict[Any, _Held] = {}
        self._spare: Tensor | None = None
        self.others: list[str] = []
        self._states: dict[Path, tuple[int, ...] | None] = {}
        self._tensors: dict[Path, set[str]] = {}
        self._folder = _local_folder(reader)
        self.identity: Hashable = (id(self),)
        if self._folder is not None:
            own = self._folder / METADATA
            self.identity = (_state(self._folder, 2), _state(own))
            self._states[own] = _state(own)
        try:
            reader.set_up_storage_reader(metadata, True)
        except Exception as error:
            raise bad_metadata(self.name, error) from error

    # -- before reading --

    def place(self, chunk: Chunk) -> Any:
        """Where a reader of files finds a chunk: has relative_path, offset, length. None if it is not known.

        Raises:
            KeyError: there should be such a place, but there is none.
        """
        return self._places[chunk.index] if isinstance(self._places, dict) else None

    def note_file(self, chunk: Chunk) -> str:
        """Remember the file of a chunk. Returns what is wrong with it, "" if nothing is."""
        try:
            place = self.place(chunk)
        except KeyError:
            return "no place in the metadata"
        path = getattr(place, "relative_path", None)
        if self._folder is None or path is None:
            return ""
        pure = pathlib.PurePath(path)
        if pure.is_absolute() or ".." in pure.parts:
            return f"in {path!r}, out of the folder"
        full = self._folder / path
        if full not in self._states:
            self._states[full] = _state(full)
        self._tensors.setdefault(full, set()).add(chunk.name)
        state = self._states[full]
        end = place.offset + place.length
        if state is not None and not 0 <= place.offset <= end <= state[2]:
            return f"up to byte {end} of {path}, which has {state[2]}"
        return ""

    def findings(self) -> list[Finding]:
        """Files that are not there."""
        lost = [path for path, state in self._states.items() if state is None]
        return [
            Finding(
                str(path),
                "file",
                "no such file",
                f"parts of {len(self._tensors.get(path, ()))} tensors, by the metadata",
                AGAIN,
            )
            for path in lost
        ]

    @property
    def paths(self) -> list[Path]:
        return list(self._states)

    def data_files(self) -> list[tuple[Path, int, int]]:
        """(path, bytes, tensors with a chunk in it) of each local file that holds tensors."""
        return [
            (path, state[2], len(self._tensors[path]))
            for path, state in self._states.items()
            if state is not None and path in self._tensors
        ]

    def check(self) -> None:
        """Make sure that the files are what they were when they were opened, and let go of what is held.

        Raises:
            SourceError: they are not. (Only local files can be looked at.)
        """
        with self._lock:
            self._held.clear()
            self._spare = None
        changed = [path for path, state in self._states.items() if _state(path) != state]
        if changed:
            hint = "open it again once it is complete"
            raise SourceError(
                "the source files are not what they were. Nothing was written.",
                [
                    Finding(str(p), "file", "gone" if _state(p) is None else "written to", "", hint)
                    for p in changed
                ],
            )

    # -- reading --

    def read_many(self, asked: Sequence[Asked]) -> None:
        """Read bytes of several chunks, each chunk once.

        Args:
            asked: (chunk, begin, end, out): bytes [begin, end) of the chunk's byte space into `out`, a contiguous
                CPU tensor, uint8, shape [end - begin].

        Raises:
            SourceError: the reader cannot read them.
        """
        by_chunk: dict[Any, list[Asked]] = {}
        for item in asked:
            if item[1] < item[2]:
                by_chunk.setdefault(item[0].index, []).append(item)
        with self._lock, _plainly():
            whole: list[tuple[Chunk, Tensor]] = []
            parts: list[list[Asked]] = []
            for key, items in by_chunk.items():
                chunk, begin, end, out = items[0]
                straight = len(items) == 1 and (begin, end) == (0, chunk.nbytes)
                if straight and key not in self._held and _fits(chunk, out):
                    whole.append((chunk, out.view(chunk.dtype).view(chunk.shape)))
                else:
                    parts.append(items)
            self._load(whole)
            last: Chunk | None = whole[-1][0] if whole else None
            for batch in _batches(parts):
                self._hold([items[0][0] for items in batch])
                for chunk, begin, end, out in (item for items in batch for item in items):
                    flat = self._held[chunk.index].tensor.view(-1).view(torch.uint8)
                    out.copy_(flat[begin:end])
                for items in batch:
                    last = items[0][0]
                    self._served(last, sum(end - begin for _, begin, end, _ in items))
                self._turn_to(last)
            if not parts:
                self._turn_to(last)

    def read_view(
        self, chunk: Chunk, sizes: Sequence[int], strides: Sequence[int], offset: int
    ) -> Tensor:
        """A part of a chunk, as a contiguous tensor in new memory."""
        out = torch.empty(tuple(sizes), dtype=chunk.dtype, device="cpu")
        if not out.numel():
            return out
        with self._lock, _plainly():
            self._hold([chunk])
            held = self._held[chunk.index].tensor
            out.copy_(held.as_strided(out.shape, tuple(strides), offset))
            self._served(chunk, out.numel() * chunk.element_size())
            self._turn_to(chunk)
        return out

    def _hold(self, chunks: Sequence[Chunk]) -> None:
        new = [chunk for chunk in chunks if chunk.index not in self._held]
        into = [self._room(chunk) for chunk in new]
        self._load(list(zip(new, into)))
        thread = threading.get_ident()
        for chunk, tensor in zip(new, into):
            self._held[chunk.index] = _Held(tensor, chunk.nbytes, thread)

    def _room(self, chunk: Chunk) -> Tensor:
        """Memory for a chunk: that of the one before, where it fits. The system gives new memory page by page."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.nbytes == chunk.nbytes:
            return spare.view(-1).view(torch.uint8).view(chunk.dtype).view(chunk.shape)
        return torch.empty(chunk.shape, dtype=chunk.dtype, device="cpu")

    def _served(self, chunk: Chunk, size: int) -> None:
        held = self._held[chunk.index]
        held.left -= size
        held.thread = threading.get_ident()
        if held.left <= 0:
            del self._held[chunk.index]
            self._spare = held.tensor

    def _turn_to(self, chunk: Chunk | None) -> None:
        """Let go of what this thread held of other tensors."""
        thread = threading.get_ident()
        for key, held in list(self._held.items()):
            if held.thread == thread and chunk is not None and key.fqn != chunk.name:
                del self._held[key]

    def _load(self, wanted: list[tuple[Chunk, Tensor]]) -> None:
        """Load whole chunks, by one call of the reader."""
        if not wanted:
            return
        wanted = sorted(wanted, key=lambda item: self._order(item[0]))
        from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

        items = [
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=chunk.index,
                dest_offsets=torch.Size([0] * chunk.dim()),
                storage_index=chunk.index,
                storage_offsets=torch.Size([0] * chunk.dim()),
                lengths=chunk.shape,
            )
            for chunk, _ in wanted
        ]
        planner = _planner_type()({chunk.index: into for chunk, into in wanted})
        reader = self._reader
        try:
            plan = reader.prepare_local_plan(LoadPlan(items))
            reader.read_data(reader.prepare_global_plan([plan])[0], planner).wait()
        except MemoryError:
            raise
        except Exception as error:  # of any storage and of torch's insides
            text = str(error).partition("\n")[0][:300]
            raise self._unread(planner.open, wanted, f"{type(error).__name__}: {text}") from error
        if planner.open:
            raise self._unread(planner.open, wanted, "not there")

    def _order(self, chunk: Chunk) -> tuple[str, int]:
        place = self.place(chunk)
        return str(getattr(place, "relative_path", "")), getattr(place, "offset", 0) or 0

    def _unread(self, left: set[Any], wanted: list[tuple[Chunk, Tensor]], got: str) -> SourceError:
        chunk = next((c for c, _ in wanted if c.index in left), wanted[0][0])
        where = self._order(chunk)[0]
        return one_fault(
            f"the checkpoint {self.name} cannot be read.",
            chunk.name,
            "file",
            f"{where}: {got}" if where else got,
            f"the chunk of shape {tuple(chunk.shape)} at {chunk.offsets}",
            f"truncated, corrupt, or out of reach; {AGAIN}",
        )

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r})"


@contextmanager
def _plainly() -> Iterator[None]:
    """Whatever the caller's modes are: what is held was made by another thread, perhaps in another one."""
    with torch.inference_mode(), torch._C.DisableTorchFunction():
        yield


def _fits(chunk: Chunk, out: Tensor) -> bool:
    """Whether a chunk's values may be put into the bytes of `out` as they are."""
    unit = max(1, chunk.element_size())
    return out.storage_offset() % unit == 0 and out.data_ptr() % unit == 0


def _batches(parts: list[list[Asked]]) -> Iterator[list[list[Asked]]]:
    batch: list[list[Asked]] = []
    size = 0
    for items in parts:
        own = items[0][0].nbytes
        if batch and size + own > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(items)
        size += own
    if batch:
        yield batch


_planner: Any = None


def _planner_type() -> Any:
    """The planner, made when DCP is there: its base class is DCP's, which takes long to import."""
    global _planner
    if _planner is not None:
        return _planner
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

    class Planner(LoadPlanner):
        """Says where the values of chunks go. `open`: those that have not come yet."""

        def __init__(self, into: dict[Any, Tensor]) -> None:
            self.into, self.open = into, set(into)

        def set_up_planner(self, *args: Any, **options: Any) -> None:
            pass

        def create_local_plan(self) -> LoadPlan:
            return LoadPlan([])

        def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
            return global_plan

        def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
            return central_plan

        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            raise ValueError(f"{read_item.dest_index.fqn} is no tensor")

        def resolve_bytes(self, read_item: Any) -> io.BytesIO:
            raise ValueError(f"{read_item.dest_index.fqn} is no tensor")

        def resolve_tensor(self, read_item: Any) -> Tensor:
            whole: Tensor = self.into[read_item.dest_index]
            box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
            for axis, (start, length) in enumerate(box):
                whole = whole.narrow(axis, start, length)
            return whole

        def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
            self.open.discard(read_item.dest_index)

    _planner = Planner
    return Planner


def _local_folder(reader: Any) -> Path | None:
    """The folder of a reader of local files. Readers that are derived from that one mean other things by a path."""
    module = sys.modules.get("torch.distributed.checkpoint.filesystem")
    if module is None or type(reader) is not module.FileSystemReader:
        return None
    return Path(os.fspath(reader.path)) if type(reader.fs) is module.FileSystem else None


def _state(path: Path, fields: int = 4) -> tuple[int, ...] | None:
    """(device, inode, bytes, time of the last change); None for what is not there."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)[:fields]
