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

import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Finding, SourceError, dtype_text
from .dcp_metadata import METADATA, ask_reader, bad_metadata, open_folder
from .dcp_reader import Asked, Checkpoint
from .faults import AGAIN, PICKLES, type_text
from .lazy import Lazy
from .spread import Segment, Spread, SpreadPart

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Asked",
    "Checkpoint",
    "Chunk",
    "Chunked",
    "is_checkpoint",
    "is_reader",
    "open_checkpoint",
]

_DATA = ".distcp"


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
        reader, metadata = open_folder(source)
    else:
        reader, metadata = source, ask_reader(source)
    checkpoint = Checkpoint(reader, metadata)
    try:
        tensors, findings = _described(checkpoint, metadata)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise bad_metadata(checkpoint.name, error) from error
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
