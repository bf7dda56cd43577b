"""Checkpoints of `torch.distributed.checkpoint` (DCP): a folder, or any of its storage readers.

Such a checkpoint holds a tensor in chunks, each of which one rank saved. Its metadata says which box of the
whole tensor a chunk is: so a tensor is a `Spread` of `Chunk`s here, and it does not matter on how many ranks
and how sharded it was saved. No process group is needed, and every rank reads for itself.

Chunks are read by DCP's own reader, with a planner of ours that says where the values go. That reader loads a
whole chunk whatever part of it is wanted, so a chunk that is read in part is held until all of it was asked
for: see `Checkpoint`.

The metadata is a pickle, and a pickle can run any code. Of a folder it is read with a list of the few types
that DCP itself puts there, and refused if it names any other. A reader that is passed as the source reads
its metadata in its own way: who passes one trusts the checkpoint.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Finding, SourceError, dtype_text
from .faults import AGAIN, PICKLES, one_fault, type_text, unreadable
from .lazy import Lazy
from .reading import StoredFile
from .spread import Segment, Spread, SpreadPart

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "METADATA",
    "Checkpoint",
    "Chunk",
    "Chunked",
    "is_checkpoint",
    "is_reader",
    "open_checkpoint",
]

METADATA = ".metadata"
_DATA = ".distcp"
# Chunks that are wanted in part are loaded together up to so many bytes: a call opens each file again.
BATCH_BYTES = 32 << 20

# (chunk, first byte, one behind the last byte, where they go)
Asked = tuple["Chunk", int, int, "Tensor"]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint of DCP, complete or not.

    Example:
        >>> is_checkpoint(Path("/nowhere"))
        False
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    if METADATA in names and any(name.endswith(_DATA) for name in names):
        return True
    # Other tools leave files of that name, too: where there is something else to read, it is not for us.
    ours = METADATA in names or any(name.endswith(_DATA) for name in names)
    return ours and not any(
        name.endswith((".safetensors", ".index.json", *PICKLES)) for name in names
    )


def is_reader(source: object) -> bool:
    """Whether an object is a `torch.distributed.checkpoint.StorageReader`."""
    storage = sys.modules.get("torch.distributed.checkpoint.storage")  # who has one has imported it
    return storage is not None and isinstance(source, storage.StorageReader)


def open_checkpoint(source: Path | Any) -> dict[str, Tensor | Lazy]:
    """The tensors of a DCP checkpoint; only its metadata is read.

    Names are those under which it was saved, joined by dots: `dcp.save({"model": m.state_dict(), "optim": ..})`
    gives `model.layers.0.weight` and `optim.state.0.exp_avg`. For a model alone:

        [Rule("model.{*p}", "{*p}"), Rule("optim.{*p}", None)]

    Entries that are no tensors (step counts, learning rates, extra state) are left out.

    Args:
        source: the folder, or a `StorageReader` (of another storage, or with extensions).

    Returns:
        name -> `Chunk` where one chunk is all of the tensor, else `Chunked`. In the order of the metadata.

    Raises:
        SourceError: the metadata is missing, damaged or holds other objects; data files are missing or cut
            off (told for local files only); chunks do not make up their tensor; tensors without plain
            values. All of these are listed.

    Example:
        >>> import tempfile, warnings
        >>> import torch.distributed.checkpoint as dcp
        >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     _ = dcp.save({"model": {"w": torch.ones(2, 3)}, "step": 7}, checkpoint_id=folder, no_dist=True)
        ...     tensors = open_checkpoint(Path(folder))
        ...     print(tensors, tensors["model.w"].load())
        {'model.w': Chunk((2, 3), torch.float32)} tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    if isinstance(source, Path):
        reader, metadata = _open_folder(source)
    else:
        reader, metadata = source, _ask_reader(source)
    checkpoint = Checkpoint(reader, metadata)
    try:
        tensors, findings = _described(checkpoint, metadata)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise _bad_metadata(checkpoint.name, error) from error
    findings = [*checkpoint.findings(), *findings]
    if findings:
        raise SourceError(
            f"the checkpoint {checkpoint.name} cannot be used, {len(findings)} problems; nothing was written.",
            findings,
        )
    return tensors


class Chunk(Lazy):
    """A box of a tensor, as one rank saved it.

    Args:
        file: the checkpoint.
        name: of the tensor.
        offsets: of the box within the tensor, in elements.
        shape, dtype: of the box. It is contiguous, however it was saved.
        number: its place in the list of the tensor's chunks.

    Attributes:
        index: what DCP knows it by.
    """

    __slots__ = ("file", "index", "name", "offsets")

    def __init__(
        self,
        file: Checkpoint,
        name: str,
        offsets: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype,
        number: int = 0,
    ) -> None:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        super().__init__(shape, dtype)
        self.file, self.name, self.offsets = file, name, tuple(offsets)
        self.index = MetadataIndex(name, self.offsets, number)

    def read_into(self, begin: int, end: int, out: Tensor) -> None:
        self._check_range(begin, end, out)
        self.file.read_many([(self, begin, end, out)])

    def read_view(self, sizes: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
        whole = tuple(sizes) == self.shape and tuple(strides) == self.strides and offset == 0
        return self.load() if whole else self.file.read_view(self, sizes, strides, offset)

    def location(self) -> Hashable:
        return (self.file.identity, self.name, self.offsets, self.shape)


class Chunked(Spread):
    """A tensor in several chunks. `file` is its checkpoint."""

    __slots__ = ("file",)

    def __init__(
        self,
        file: Checkpoint,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        chunks: Sequence[Chunk],
    ) -> None:
        super().__init__(shape, dtype, [_part(chunk) for chunk in chunks], (file.identity, name))
        self.file = file


def _part(chunk: Chunk) -> SpreadPart:
    axes = tuple(
        (Segment(start, length, 0),) if length else ()
        for start, length in zip(chunk.offsets, chunk.shape, strict=True)
    )
    return SpreadPart(axes, chunk)


# ---- reading -------------------------------------------------------------------------------------


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
        self.name = _name_of(reader)
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
            raise _bad_metadata(self.name, error) from error

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


# ---- metadata ------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> tuple[Any, Any]:
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
        from torch.distributed.checkpoint import FileSystemReader
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
        raise _bad_metadata(str(path), error) from error
    if not isinstance(metadata, Metadata):
        raise file.fault(type_text(metadata), "metadata of torch.distributed.checkpoint")
    return FileSystemReader(folder), metadata


_NEEDS = "a torch built with torch.distributed is needed to read it"


def _ask_reader(reader: Any) -> Any:
    try:
        return reader.read_metadata()
    except MemoryError:
        raise
    except Exception as error:
        raise _bad_metadata(_name_of(reader), error) from error


def _bad_metadata(name: str, error: Exception) -> SourceError:
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


def _described(
    checkpoint: Checkpoint, metadata: Any
) -> tuple[dict[str, Tensor | Lazy], list[Finding]]:
    """The tensors of the metadata, and what is wrong with them."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    tensors: dict[str, Tensor | Lazy] = {}
    findings: list[Finding] = []
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str):
            findings.append(Finding(f"{name!r}", "type", type_text(name), "a name (str)"))
            continue
        if not isinstance(entry, TensorStorageMetadata):
            checkpoint.others.append(name)
            continue
        dtype, shape = entry.properties.dtype, torch.Size(entry.size)
        trouble = _dtype_trouble(dtype, getattr(entry.properties, "layout", torch.strided))
        if trouble:
            findings.append(Finding(name, "layout", trouble, "plain values"))
            continue
        if not shape.numel():  # whatever empty chunks there are
            tensors[name] = Chunk(checkpoint, name, [0] * len(shape), shape, dtype)
            continue
        chunks = [
            Chunk(checkpoint, name, torch.Size(c.offsets), torch.Size(c.sizes), dtype, k)
            for k, c in enumerate(entry.chunks)
        ]
        trouble = _box_trouble(shape, chunks)
        chunks = [chunk for chunk in chunks if chunk.numel()]
        if trouble:
            findings.append(Finding(name, "shape", trouble, f"all of {tuple(shape)}", _BROKEN))
            continue
        lost = dict.fromkeys(filter(None, map(checkpoint.note_file, chunks)))
        findings += [Finding(name, "file", text, "", _BROKEN) for text in lost]
        one = len(chunks) == 1
        tensors[name] = chunks[0] if one else Chunked(checkpoint, name, shape, dtype, chunks)
    return tensors, findings


_BROKEN = f"incomplete, or corrupt; {AGAIN}"


def _dtype_trouble(dtype: torch.dtype, layout: torch.layout) -> str:
    if layout is not torch.strided:
        return f"a tensor of layout {layout}"
    name = dtype_text(dtype)
    if name.startswith(("quint", "qint")):
        return f"a quantized tensor ({name})"
    return ""


def _box_trouble(shape: torch.Size, chunks: Sequence[Chunk]) -> str:
    """Why chunks do not make up a tensor of that shape, "" where they do."""
    for chunk in chunks:
        inside = len(chunk.shape) == len(chunk.offsets) == len(shape) and all(
            0 <= start <= start + length <= n
            for start, length, n in zip(chunk.offsets, chunk.shape, shape)
        )
        if not inside:
            return f"a chunk of shape {tuple(chunk.shape)} at {chunk.offsets}"
    there = sum(chunk.numel() for chunk in chunks)  # DCP saves no element twice
    return "" if there == shape.numel() else f"chunks of {there} elements"


def _name_of(reader: Any) -> str:
    for attribute in ("path", "checkpoint_id"):
        try:
            found = getattr(reader, attribute, None)
        except Exception:
            found = None
        if found:
            return str(found)
    return type(reader).__name__


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
