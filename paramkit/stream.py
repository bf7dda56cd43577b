"""A plan whose sources are not in memory: read piece by piece into a bounded buffer, and written from there.

The writes are cut into pieces (`pieces`), put in the order in which their bytes lie in the files, and
packed into steps. A step reads its bytes into one half of a staging buffer and runs a backend's plan of
its pieces, whose sources are views of that half; meanwhile the other half is read for the next step.
Where all pieces of a step are bytes in a row on both sides, of one dtype and in CPU memory, they are read
straight to where they belong: there is nothing to rearrange, and a second copy would take as long again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .pieces import cut, span, view_of
from .resolve import Write
from .sources.dcp import Asked, Checkpoint, Chunk, Chunked
from .sources.lazy import Lazy, Stored, StoredFile, in_a_row

__all__ = ["STAGING_BYTES", "Streamed"]

# Both halves together; also the bytes of a call that reads straight to where they belong. 1 GiB of bfloat16 from
# a warm file, 2 cores: 154 ms with 8 MiB, 141 with 16, 116 with 32, 106 with 64, 103 with 128.
STAGING_BYTES = 32 << 20
_ALIGN = 64
# Bytes between two reads that are read along: a request costs as much as a copy of about this many.
_GAP = 32 << 10

Progress = Callable[[int, int], object]


@dataclass
class _Read:
    """Bytes [begin, end) of a source, put at `at` in the half."""

    source: Lazy
    begin: int
    end: int
    at: int = 0
    pieces: list[tuple[int, Write]] = field(default_factory=list)  # (number of the write, piece)


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
        straight: (file, offset, bytes of the destination) of all pieces, where they may be read straight there.
    """

    reads: list[_Read]
    plan: Any
    write_of: list[int]
    dsts: list[int]
    bytes: int
    half: int = 0
    straight: list[tuple[StoredFile, int, Tensor]] | None = None


class Streamed:
    """Looks like a backend's plan. See there for the arguments; `budget` bounds the staging in bytes.

    Raises:
        ValueError: one element does not fit into the budget.
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
        used = max((r.at + r.end - r.begin for reads in packed for r in reads), default=0)
        self._half = -(-used // _ALIGN) * _ALIGN
        # Only as much as is needed; one half where there is one step.
        self._staging = torch.empty(self._half * min(2, len(packed)) + _ALIGN, dtype=torch.uint8)
        shift = -self._staging.data_ptr() % _ALIGN
        self._staging = self._staging[shift:]
        self.steps = self._steps(packed, slots)

    # -- planning --

    def _units(self) -> list[_Read]:
        """Spans of sources with all pieces that read within them; no two share bytes if they need not."""
        by_source: dict[int, list[tuple[int, Write]]] = {}
        for number, write in enumerate(self._writes):
            if isinstance(self._srcs[write.src], Lazy) and 0 not in write.sizes:
                by_source.setdefault(write.src, []).append((number, write))
        units: list[_Read] = []
        for s, writes in by_source.items():
            source = self._srcs[s]
            size = source.element_size()
            pieces: list[tuple[int, int, int, Write]] = []
            for number, write in writes:
                for (piece,) in cut([write], [size], self._half // 4):
                    begin, end = span(piece, size)
                    if end - begin > self._half:
                        raise ValueError(
                            f"staging: one element of {end - begin} bytes does not fit"
                        )
                    pieces.append((begin, end, number, piece))
            pieces.sort(key=lambda p: (p[0], p[1], p[2]))
            units += self._joined(source, pieces)
        return units

    def _joined(self, source: Lazy, pieces: Sequence[tuple[int, int, int, Write]]) -> list[_Read]:
        # Pieces whose spans interleave stay together, so that no byte is read twice.
        clusters: list[_Read] = []
        for begin, end, number, piece in pieces:
            last = clusters[-1] if clusters else None
            if last is None or begin >= last.end or max(end, last.end) - last.begin > self._half:
                clusters.append(_Read(source, begin, end, 0, [(number, piece)]))
            else:
                last.end = max(last.end, end)
                last.pieces.append((number, piece))
        units: list[_Read] = []
        for read in clusters:
            last = units[-1] if units else None
            near = last is not None and last.end <= read.begin <= last.end + _GAP
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
            size = read.end - read.begin
            if step and at + size > self._half:
                yield step
                step, at = [], 0
            read.at = at
            step.append(read)
            at += -(-size // _ALIGN) * _ALIGN
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
                    [(number, w, w.src, w.src_offset) for number, w in direct],
                    slots,
                )
            )
            slots = []
        for k, reads in enumerate(packed):
            start = (k % 2) * self._half
            half = self._staging[start:]
            srcs, pieces = [], []
            for n, read in enumerate(reads):
                size = read.end - read.begin
                srcs.append(half[read.at : read.at + size].view(read.source.dtype))
                shift = read.begin // read.source.element_size()
                pieces += [(number, w, n, w.src_offset - shift) for number, w in read.pieces]
            step = self._step(reads, srcs, pieces, slots if k == 0 else [], start)
            # The first goes through staging: a file that cannot be read at all is then told before a write.
            step.straight = self._straight(reads) if k > 0 else None
            steps.append(step)
        return steps

    def _step(
        self,
        reads: list[_Read],
        srcs: list[Tensor],
        pieces: Sequence[tuple[int, Write, int, int]],
        slots: list[Any],
        half: int = 0,
    ) -> Step:
        used = sorted({w.dst for _, w, _, _ in pieces})
        number_of = {d: k for k, d in enumerate(used)}
        writes = [
            replace(w, src_offset=offset).plain(number_of[w.dst], s) for _, w, s, offset in pieces
        ]
        dsts = [self._dsts[d] for d in used]
        plan = self._active.Plan(dsts, srcs, writes, slots, False, False)
        size = sum(prod(w.sizes) * self._dsts[w.dst].element_size() for _, w, _, _ in pieces)
        numbers = [number for number, *_ in pieces]
        return Step(reads, plan, numbers, used, size, half)

    def _straight(self, reads: Sequence[_Read]) -> list[tuple[StoredFile, int, Tensor]] | None:
        """The pieces as ranges of a file and of destinations, None where some have to be rearranged."""
        out: list[tuple[StoredFile, int, Tensor]] = []
        for read in reads:
            source = read.source
            if not isinstance(source, Stored):
                return None
            size = source.element_size()
            for _, w in read.pieces:
                dst = self._dsts[w.dst]
                plain = type(dst) in (Tensor, nn.Parameter) and dst.device.type == "cpu"
                if not plain or dst.dtype != source.dtype or dst.is_conj() or dst.is_neg():
                    return None
                if not (in_a_row(w.sizes, w.dst_strides) and in_a_row(w.sizes, w.src_strides)):
                    return None
                place = view_of(dst, (prod(w.sizes),), (1,), w.dst_offset).view(torch.uint8)
                out.append((source.file, source.offset + w.src_offset * size, place))
        return out or None

    # -- what a backend's plan has --

    def families(self) -> list[str]:
        found = ["copy"] * len(self._writes)
        for step in self.steps:
            for number, family in zip(step.write_of, step.plan.families(), strict=True):
                found[number] = family
        return found

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
        asked = []
        chunks: dict[Checkpoint, list[Asked]] = {}
        for read in step.reads:
            out = half[read.at : read.at + read.end - read.begin]
            if isinstance(read.source, Stored):
                asked.append((read.source.file, read.source.offset + read.begin, out))
            elif isinstance(read.source, Chunk):
                wanted = chunks.setdefault(read.source.file, [])
                wanted.append((read.source, read.begin, read.end, out))
            else:
                read.source.read_into(read.begin, read.end, out)
        _read_all(asked)
        for checkpoint, wanted in chunks.items():
            checkpoint.read_many(wanted)


def _read_all(asked: Sequence[tuple[StoredFile, int, Tensor]]) -> None:
    """Read ranges of files, each file's in one call."""
    by_file: dict[int, tuple[StoredFile, list[tuple[int, Tensor]]]] = {}
    for file, offset, out in asked:
        by_file.setdefault(id(file), (file, []))[1].append((offset, out))
    for file, ranges in by_file.values():
        file.read_many(ranges)


def _in_file_order(units: list[_Read]) -> list[_Read]:
    def place(read: _Read) -> tuple[int, str, int]:
        if isinstance(read.source, Stored):
            return 0, str(read.source.file.path), read.source.offset + read.begin
        return 1, "", 0

    return sorted(units, key=place)
