"""A plan whose sources are not in memory: read piece by piece into a bounded buffer, and written from there.

The writes are cut into pieces (`pieces`), put in the order in which their bytes lie in the files, and
packed into steps. A step reads its bytes into one half of a staging buffer and runs a backend's plan of
its pieces, whose sources are views of that half; meanwhile the other half is read for the next step.
Where all pieces of a step are rows of bytes on both sides, of one dtype and in CPU memory, they are read
straight to where they belong: there is nothing to rearrange, and a second copy would take as long again.

What a step reads of a file are the bytes that its pieces need (`ranges`): of a part of each row, the rest of the
row is neither read nor given room in the staging buffer. Only gaps of less than `GAP` bytes are read along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .pieces import cut, span, view_of
from .ranges import Rows, bytes_of, loops, packed, ranges_of
from .resolve import Write
from .sources.dcp import Asked, Checkpoint, Chunk, Chunked
from .sources.lazy import Lazy, Stored, StoredFile
from .sources.reading import GAP, Range

__all__ = ["STAGING_BYTES", "Streamed"]

# Both halves together; also the bytes of a call that reads straight to where they belong. 1 GiB of bfloat16 from
# a warm file, 2 cores: 154 ms with 8 MiB, 141 with 16, 116 with 32, 106 with 64, 103 with 128.
STAGING_BYTES = 32 << 20
_ALIGN = 64
# Bytes between two reads of what is in no plain file, which are read along: a request costs as much as a copy
# of about this many.
_GAP = 32 << 10

Progress = Callable[[int, int], object]


_Piece = tuple[int, Write]  # (number of the write that it is a piece of, piece)


@dataclass
class _Read:
    """Bytes [begin, end) of a source, or rows of bytes within them, put at `at` in the half.

    Attributes:
        pieces: what reads them.
        size: bytes in the half.
        rows: what is read, packed in the half; None for all bytes.
        views: the pieces, reading the packed rows as if they were the source; none without `rows`.
    """

    source: Lazy
    begin: int
    end: int
    at: int = 0
    pieces: list[_Piece] = field(default_factory=list)
    rows: list[Rows] | None = None
    views: list[Write] = field(default_factory=list)
    packed_size: int = 0

    @property
    def size(self) -> int:
        return self.end - self.begin if self.rows is None else self.packed_size

    def plain(self) -> list[_Piece]:
        """The pieces, reading the half's bytes from `at` on as if they were the source."""
        if self.rows is not None:
            return [
                (number, view) for (number, _), view in zip(self.pieces, self.views, strict=True)
            ]
        shift = self.begin // self.source.element_size()
        return [(number, replace(w, src_offset=w.src_offset - shift)) for number, w in self.pieces]


@dataclass
class Step:
    """What is read and written at once.

    Attributes:
        reads: what goes into the staging half; none for sources in memory.
        plan: the backend's.
        write_of: for each write of `plan` the number of the write that it is a piece of.
        dsts: for each destination of `plan` its number.
        bytes: destination bytes.
        half: where its half of the staging buffer begins.
        straight: (file, range whose memory is the destination's) of all pieces, where they may be read straight
            there.
    """

    reads: list[_Read]
    plan: Any
    write_of: list[int]
    dsts: list[int]
    bytes: int
    half: int = 0
    straight: list[tuple[StoredFile, Range]] | None = None


class Streamed:
    """Looks like a backend's plan. See there for the arguments; `budget` bounds the staging in bytes.

    Raises:
        ValueError: one element does not fit into the budget.
        MemoryError: there is no memory for the staging buffer.
    """

    def __init__(
        self,
        active: Any,
        dsts: list[Tensor],
        srcs: list[Any],
        writes: list[Write],
        slots: list[Any],
        budget: int,
    ) -> None:
        self._active, self._dsts, self._srcs, self._writes = active, dsts, srcs, writes
        # The budget holds both halves, and what it takes to begin the first at a multiple of _ALIGN.
        self._half = max((budget - _ALIGN) // 2 // _ALIGN * _ALIGN, _ALIGN)
        units = _in_file_order(self._units())
        self._staging = torch.empty(0, dtype=torch.uint8)
        packed = list(self._packed(units))
        used = max((r.at + r.size for reads in packed for r in reads), default=0)
        self._half = -(-used // _ALIGN) * _ALIGN
        # Only as much as is needed; one half where there is one step.
        self._staging = _memory(self._half * min(2, len(packed)) + _ALIGN)
        shift = -self._staging.data_ptr() % _ALIGN
        self._staging = self._staging[shift:]
        self.steps = self._steps(packed, slots)

    # -- planning --

    def _units(self) -> list[_Read]:
        """What is read of the sources, with all pieces that read it; nothing is in two if it need not."""
        by_source: dict[int, list[_Piece]] = {}
        for number, write in enumerate(self._writes):
            if isinstance(self._srcs[write.src], Lazy) and 0 not in write.sizes:
                by_source.setdefault(write.src, []).append((number, write))
        units: list[_Read] = []
        for s, writes in by_source.items():
            source = self._srcs[s]
            clusters: list[_Read] = []
            for cluster in self._clusters(source, writes, isinstance(source, Stored)):
                clusters += self._without_gaps(cluster)
            units += self._joined(clusters)
        return units

    def _clusters(
        self, source: Lazy, writes: Sequence[_Piece], without_gaps: bool
    ) -> Iterator[_Read]:
        """The writes in pieces; pieces whose spans interleave are together, so that no byte is read twice."""
        size = source.element_size()
        pieces: list[tuple[int, int, int, Write]] = []
        for number, write in writes:
            measure = bytes_of if without_gaps else None
            for (piece,) in cut([write], [size], self._half // 4, measure):
                begin, end = span(piece, size)
                if (bytes_of(piece, size) if without_gaps else end - begin) > self._half:
                    raise ValueError(f"staging: one element of {size} bytes does not fit")
                pieces.append((begin, end, number, piece))
        pieces.sort(key=lambda p: (p[0], p[1], p[2]))
        last: _Read | None = None
        total = 0  # bytes of its pieces
        for begin, end, number, piece in pieces:
            own = bytes_of(piece, size) if without_gaps else end - begin
            if last is not None and begin < last.end:
                both = max(end, last.end) - last.begin
                if (min(total + own, both) if without_gaps else both) <= self._half:
                    last.end = max(last.end, end)
                    last.pieces.append((number, piece))
                    total += own
                    continue
            if last is not None:
                yield last
            last, total = _Read(source, begin, end, 0, [(number, piece)]), own
        if last is not None:
            yield last

    def _without_gaps(self, cluster: _Read) -> list[_Read]:
        """What a cluster reads, as one read of rows; as several, or with gaps, where strides cannot say that."""
        source = cluster.source
        size = source.element_size()
        if not isinstance(source, Stored) or not any(loops(w, size)[1] for _, w in cluster.pieces):
            return [cluster]
        made = packed([w for _, w in cluster.pieces], size)
        if (
            made.bytes <= self._half
        ):  # short gaps between pieces count, those within them did already
            if len(made.rows) == 1 and made.rows[0].rows == 1:
                return [cluster]
            if made.writes is not None:
                cluster.rows, cluster.views, cluster.packed_size = (
                    made.rows,
                    made.writes,
                    made.bytes,
                )
                return [cluster]
        if made.apart and len(cluster.pieces) > 1:
            alone = [_Read(source, *span(w, size), 0, [(n, w)]) for n, w in cluster.pieces]
            return [read for one in alone for read in self._without_gaps(one)]
        return list(self._clusters(source, cluster.pieces, False))

    def _joined(self, clusters: Sequence[_Read]) -> list[_Read]:
        """Reads of one source; neighbours are one."""
        units: list[_Read] = []
        for read in clusters:
            last = units[-1] if units else None
            most = GAP - 1 if isinstance(read.source, Stored) else _GAP
            near = (
                last is not None
                and last.rows is read.rows is None
                and last.end <= read.begin <= last.end + most
            )
            if last is not None and near and read.end - last.begin <= self._half // 2:
                last.end = read.end
                last.pieces += read.pieces
            else:
                units.append(read)
        return units

    def _packed(self, units: Sequence[_Read]) -> Iterator[list[_Read]]:
        """Units put into halves, one list of them a step."""
        step: list[_Read] = []
        at = 0
        for read in units:
            if step and at + read.size > self._half:
                yield step
                step, at = [], 0
            read.at = at
            step.append(read)
            at += -(-read.size // _ALIGN) * _ALIGN
        if step:
            yield step

    def _steps(self, packed: Sequence[list[_Read]], slots: list[Any]) -> list[Step]:
        steps: list[Step] = []
        direct = [
            (number, write)
            for number, write in enumerate(self._writes)
            if not isinstance(self._srcs[write.src], Lazy) or 0 in write.sizes
        ]
        if direct or not packed:
            empty = torch.empty(0, dtype=torch.uint8)
            srcs = [empty if isinstance(s, Lazy) else s for s in self._srcs]
            steps.append(
                self._step(
                    [],
                    [s.view(own.dtype) if s is empty else s for s, own in zip(srcs, self._srcs)],
                    [(number, w, w.src) for number, w in direct],
                    slots,
                )
            )
            slots = []
        for k, reads in enumerate(packed):
            start = (k % 2) * self._half
            half = self._staging[start:]
            srcs, pieces = [], []
            for n, read in enumerate(reads):
                srcs.append(half[read.at : read.at + read.size].view(read.source.dtype))
                pieces += [(number, w, n) for number, w in read.plain()]
            step = self._step(reads, srcs, pieces, slots if k == 0 else [], start)
            # The first goes through staging: a file that cannot be read at all is then told before a write.
            step.straight = self._straight(reads) if k > 0 else None
            steps.append(step)
        return steps

    def _step(
        self,
        reads: list[_Read],
        srcs: list[Tensor],
        pieces: Sequence[tuple[int, Write, int]],
        slots: list[Any],
        half: int = 0,
    ) -> Step:
        used = sorted({w.dst for _, w, _ in pieces})
        number_of = {d: k for k, d in enumerate(used)}
        writes = [w.plain(number_of[w.dst], s) for _, w, s in pieces]
        dsts = [self._dsts[d] for d in used]
        plan = self._active.Plan(dsts, srcs, writes, slots, False, False)
        size = sum(prod(w.sizes) * self._dsts[w.dst].element_size() for _, w, _ in pieces)
        numbers = [number for number, *_ in pieces]
        return Step(reads, plan, numbers, used, size, half)

    def _straight(self, reads: Sequence[_Read]) -> list[tuple[StoredFile, Range]] | None:
        """The pieces as ranges of a file and of destinations, None where some have to be rearranged."""
        out: list[tuple[StoredFile, Range]] = []
        for read in reads:
            source = read.source
            if not isinstance(source, Stored):
                return None
            for _, w in read.pieces:
                dst = self._dsts[w.dst]
                plain = type(dst) in (Tensor, nn.Parameter) and dst.device.type == "cpu"
                if not plain or dst.dtype != source.dtype or dst.is_conj() or dst.is_neg():
                    return None
                ranges = _row_ranges(w, source, dst)
                if ranges is None:
                    return None
                out += [(source.file, some) for some in ranges]
        return out or None

    # -- what a backend's plan has --

    def families(self) -> list[str]:
        found = ["copy"] * len(self._writes)
        for step in self.steps:
            for number, family in zip(step.write_of, step.plan.families(), strict=True):
                found[number] = family
        return found

    def claim(self, doing: str = "write") -> Any:
        """Keeps other threads from the memory of this plan while a block runs, all of its steps."""
        in_memory = [s for s in self._srcs if not isinstance(s, Lazy)]
        return self._active.Claim(self._dsts, in_memory, doing)

    def replaced(self) -> list[int]:
        return self.steps[0].plan.replaced() if self.steps else []

    def moved(self) -> tuple[list[int], list[int]]:
        dsts, srcs = set(), set()
        for step in self.steps:
            moved, sources = step.plan.moved()
            dsts |= {step.dsts[k] for k in moved}
            if not step.reads:
                srcs |= set(sources)
        return sorted(dsts), sorted(srcs)

    def destinations(self) -> list[Tensor]:
        return list(self._dsts)

    def sources(self) -> list[Any]:
        return list(self._srcs)

    def writes(self) -> list[tuple[Any, ...]]:
        return [w.plain(w.dst, w.src) for w in self._writes]

    def rebind(self, tensors: dict[str, Any], names: list[str]) -> bool:
        """True: not taken. What lies in a file is planned anew."""
        return True

    def run(self, progress: Progress | None = None) -> bool:
        """Write. False, and nothing written, if `replaced` or `moved` has something to say."""
        if self.replaced() or any(self.moved()):
            return False
        for step in self.loaded(writing=True):
            self.run_step(step)
        return True

    def run_step(self, step: Step) -> None:
        """Write a step of `loaded(writing=True)`."""
        if not self._goes_straight(step):
            if not step.plan.run(None):
                raise RuntimeError("a tensor was moved while the plan ran")
            return
        assert step.straight is not None
        for d in step.dsts:
            torch.autograd.graph.increment_version(self._dsts[d])
        _read_all(step.straight)

    @staticmethod
    def _goes_straight(step: Step) -> bool:
        # Under a mode, every write has to be an operation that it sees.
        return step.straight is not None and not (
            torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        )

    def verify(self) -> list[int]:
        """Numbers of the writes whose destination does not hold what the source says."""
        differ: set[int] = set()
        for step in self.loaded():
            differ |= {step.write_of[k] for k in step.plan.verify()}
        return sorted(differ)

    def loaded(self, writing: bool = False) -> Iterator[Step]:
        """The steps, each with its bytes in the staging buffer while it is the current one.

        `writing`: only for `run_step`, which needs no staging where it reads straight to the destination.

        Raises:
            SourceError: a file was changed or cut since it was opened, or cannot be read.
        """
        files: list[StoredFile | Checkpoint] = list({id(f): f for f in self._files()}.values())
        for file in files:
            file.check()
        yield from self._prefetched(writing)
        for file in files:
            file.check()

    def _files(self) -> Iterator[StoredFile | Checkpoint]:
        for source in self._srcs:
            if isinstance(source, (Stored, Chunk, Chunked)):
                yield source.file

    def _prefetched(self, writing: bool) -> Iterator[Step]:
        staged = [bool(s.reads) and not (writing and self._goes_straight(s)) for s in self.steps]
        if sum(staged) <= 1:
            for k, step in enumerate(self.steps):
                if staged[k]:
                    self._load(step)
                yield step
            return
        with ThreadPoolExecutor(1, "paramkit-read") as pool:
            ahead: Future[None] | None = None
            for k, step in enumerate(self.steps):
                if ahead is not None:
                    ahead.result()
                elif staged[k]:
                    self._load(step)
                more = k + 1 < len(self.steps) and staged[k + 1]
                ahead = pool.submit(self._load, self.steps[k + 1]) if more else None
                yield step

    def _load(self, step: Step) -> None:
        half = self._staging[step.half :]
        asked: list[tuple[StoredFile, Range]] = []
        chunks: dict[Checkpoint, list[Asked]] = {}
        for read in step.reads:
            out = half[read.at : read.at + read.size]
            if isinstance(read.source, Stored):
                rows = read.rows or [Rows(read.begin, read.size)]
                file = read.source.file
                asked += [(file, some) for some in ranges_of(read.source, rows, out)]
            elif isinstance(read.source, Chunk):
                wanted = chunks.setdefault(read.source.file, [])
                wanted.append((read.source, read.begin, read.end, out))
            else:
                read.source.read_into(read.begin, read.end, out)
        _read_all(asked)
        for checkpoint, wanted in chunks.items():
            checkpoint.read_many(wanted)


def _memory(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:  # torch's
        raise MemoryError(
            f"staging: there is no memory for a buffer of {size:,} bytes; nothing was written. "
            "Pass a smaller staging="
        ) from error


def _row_ranges(write: Write, source: Stored, dst: Tensor) -> list[Range] | None:
    """A write as rows of bytes from a file to a destination of the same dtype, None where it is anything else.

    Rows of less than `GAP` bytes are better off in staging: there are too many of them.
    """
    axes = _common_axes(write)
    run = 1
    while axes and axes[-1][0] == axes[-1][1] == run:
        run *= axes.pop()[2]
    size = source.element_size()
    first = source.offset + write.src_offset * size
    if not axes:
        return [(first, view_of(dst, (run,), (1,), write.dst_offset).view(torch.uint8))]
    # Rows that overlap are not rows: an element that is read again and again, or is written in another order.
    if run * size < GAP or any(src < run or dst < run for src, dst, _ in axes):
        return None
    src_step, dst_step, rows = axes.pop(max(range(len(axes)), key=lambda k: axes[k][2]))
    out: list[Range] = []
    for turn in product(*(range(n) for _, _, n in axes)):
        src = sum(k * axis[0] for k, axis in zip(turn, axes, strict=True))
        at = write.dst_offset + sum(k * axis[1] for k, axis in zip(turn, axes, strict=True))
        place = view_of(dst, (rows, run), (dst_step, 1), at).view(torch.uint8)
        out.append((first + src * size, place, src_step * size))
    return out


def _common_axes(write: Write) -> list[tuple[int, int, int]]:
    """(source stride, destination stride, size) of a write's axes, the source's outermost first.

    What is one loop for both is one axis.
    """
    sides = zip(write.src_strides, write.dst_strides, write.sizes, strict=True)
    axes: list[tuple[int, int, int]] = []
    for src, dst, n in sorted((axis for axis in sides if axis[2] > 1), reverse=True):
        if axes and axes[-1][:2] == (src * n, dst * n):
            axes[-1] = src, dst, axes[-1][2] * n
        else:
            axes.append((src, dst, n))
    return axes


def _read_all(asked: Sequence[tuple[StoredFile, Range]]) -> None:
    """Read ranges of files, each file's in one call."""
    by_file: dict[int, tuple[StoredFile, list[Range]]] = {}
    for file, some in asked:
        by_file.setdefault(id(file), (file, []))[1].append(some)
    for file, ranges in by_file.values():
        file.read_many(ranges)


def _in_file_order(units: list[_Read]) -> list[_Read]:
    def place(read: _Read) -> tuple[int, str, int]:
        if isinstance(read.source, Stored):
            return 0, str(read.source.file.path), read.source.offset + read.begin
        return 1, "", 0

    return sorted(units, key=place)
