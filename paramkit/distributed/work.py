"""A transfer, compiled on one rank: what all ranks agreed on, this rank's messages, and one pass over them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backend
from ..before import tie_findings
from ..boxes import placed
from ..casting import may_overflow, overflow_finding, overflows
from ..destinations import Destination
from ..errors import Finding, PlanError, dtype_text
from ..fills import Constant, Mean
from ..judge import slots_of
from ..localize import localize
from ..pieces import view_of
from ..plan import Options
from ..report import Cast, Summary
from ..resolve import Tie, Write, plan_error, resolve
from ..sharding import unsharded_finding
from ..sources.lazy import Lazy, reach
from ..sources.spread import Spread
from ..stream import Streamed
from ..torn import Torn
from .agree import Common, agree_on
from .layout import Tensors, describe_model, describe_source, shards_of, spreads
from .routes import Piece, Stream, degree, route
from .run import Course, Run
from .talk import Talk
from .traffic import ALIGN, HEADER, Locals, Traffic, wire_dtype

__all__ = ["Bucket", "Entry", "Want", "Work"]

Progress = Callable[[int, int], object]
# A message of less would be all header and latency.
LEAST = 4096


@dataclass(frozen=True)
class Want:
    """What a rank asks for.

    Attributes:
        model: what it writes; None: nothing.
        source: what it holds; None: nothing.
        options: how names are matched, as for `paramkit.plan`.
        capacity: bytes of a message; None: as much as `options.staging` allows.
        sums: keep a sum of each message, of each parameter.
        stream: take whole tensors one by one instead of writing a model.
    """

    model: nn.Module | Mapping[str, Tensor] | None
    source: nn.Module | Mapping[str, Tensor] | None
    options: Options
    capacity: int | None = None
    sums: tuple[bool, bool] = (False, False)
    stream: bool = False

    def settings(self) -> dict[str, str]:
        """What all ranks have to be given alike, as text."""
        o = self.options
        said = {f"rules[{k}]": repr(rule) for k, rule in enumerate(o.rules)}
        for name in ("identity", "allow_missing", "allow_unexpected", "casting", "overflow"):
            said[name] = repr(getattr(o, name))
        said["staging"] = repr(o.staging)
        said["bucket_bytes"] = repr(self.capacity)
        said["checksum"] = repr(self.sums)
        return said


class Entry(NamedTuple):
    """A tensor in a bucket: `offset` in bytes from its begin."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Bucket(NamedTuple):
    """Whole tensors one behind the other.

    Attributes:
        buffer: shape [bytes], uint8. It is used again for the next bucket.
        entries: what lies where in it.
    """

    buffer: Tensor
    entries: tuple[Entry, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the buffer, by name."""
        for name, dtype, shape, offset in self.entries:
            size = prod(shape) * dtype.itemsize
            yield name, self.buffer[offset : offset + size].view(dtype).view(shape)


class Work:
    """Compiled on every rank of a group together.

    Args:
        talk: the group.
        want: what this rank asks for.
        doing: for errors: "planning".

    Raises:
        SyncError: on every rank.

    Attributes:
        passes: messages, in order; several where tensors are taken one by one.
        torn: what the last failed pass left here.
        summary: what this rank writes.
    """

    def __init__(self, talk: Talk, want: Want, doing: str) -> None:
        self.talk, self.want = talk, want
        self.torn: Torn | None = None
        with paused_collection():
            self._compile(doing)

    # -- compiling --

    def _compile(self, doing: str) -> None:
        talk, want = self.talk, self.want
        self.common, self.dst, self.src = agree_on(
            talk, lambda: _describe(talk, want), want.settings(), doing, want.stream
        )
        talk.together(doing, self._resolve)
        most = max(n for (n,) in talk.numbers([degree(self.routes.streams, talk.rank)]))
        self.capacity = self._capacity(most)
        talk.together(doing, self._build)

    def _resolve(self) -> None:
        common, options = self.common, self.want.options
        self._spreads = spreads(common.dst.description, self.dst, "destination")
        sources = spreads(common.src.description, self.src, "source")
        named = dict(zip(common.src.description.names, sources, strict=True))
        settings = options.resolving()
        settings.pop("device")
        self.resolved = resolve({}, named, **settings, destinations=self._destinations())
        self.routes, findings = route(self.resolved, common, self.talk.rank)
        if self.talk.rank in common.dst.ranks:
            findings += self._fill_findings()
        self._ties = self._comparable(findings)
        if findings:
            raise plan_error(findings)
        wanted = [
            (self.resolved.source_tensors[w.src].dtype, common.dst.description.dtypes[w.dst])
            for w in self.resolved.writes
        ]
        self.wire = [wire_dtype(src, dst) for src, dst in wanted]
        self.dst_dtypes = [dst for _, dst in wanted]
        self.names = [self.resolved.destinations[w.dst].name for w in self.resolved.writes]

    def _destinations(self) -> list[Destination]:
        if self.dst is not None:
            return [
                Destination(d.name, t, d.owner, d.key, d.kind, d.path, d.aliases, d.alias_places)
                for d, t in zip(self.dst.destinations, self._spreads, strict=True)
            ]
        d = self.common.dst.description
        return [
            Destination(name, spread, None, name, kind, aliases=aliases)
            for name, spread, kind, aliases in zip(
                d.names, self._spreads, d.kinds, d.aliases, strict=True
            )
        ]

    def _fill_findings(self) -> list[Finding]:
        out = []
        for name, tensor in zip(self.resolved.source_names, self.resolved.source_tensors):
            if isinstance(tensor, Mean) and isinstance(tensor.source, Spread):
                if not _is_here(tensor.source):
                    out.append(
                        Finding(
                            name,
                            "rule",
                            "the mean of rows that other ranks hold",
                            "rows that every rank holds in full",
                            'fill with a number or {"normal": std}, or gather them first',
                        )
                    )
        return out

    def _comparable(self, findings: list[Finding]) -> list[Tie]:
        """Pairs of sources of the same elements that this rank can compare; a finding if none can."""
        resolved, mine = self.resolved, []
        number = {n: k for k, n in enumerate(self.common.src.description.names)}
        for tie in resolved.ties:
            a, b = (resolved.source_tensors[w.src] for w in tie)
            one, other = tie
            same = (one.src_strides, one.src_offset) == (other.src_strides, other.src_offset)
            if same and a.location() == b.location():
                continue
            if _is_here(a) and _is_here(b):
                mine.append(tie)
            names = [resolved.source_names[w.src] for w in tie]
            full = [_in_full(self.common, number[name]) for name in names]
            if not full[0] & full[1]:
                findings.append(
                    Finding(
                        resolved.destinations[one.dst].name,
                        "conflict",
                        f"the same elements from {names[0]} and from {names[1]}, which no rank can compare",
                        "one source for each element",
                        "drop one of them with a rule: Rule(name, None)",
                    )
                )
        return mine

    def _capacity(self, most: int) -> int:
        """Bytes of a message."""
        if self.want.capacity is not None:
            return max(self.want.capacity // ALIGN * ALIGN, LEAST)
        # Two buffers for each stream that a rank has on the way at once. Header and sums are a part of them.
        each = self.want.options.staging // (2 * max(most, 1)) - HEADER
        return max(min(each, 32 << 20) // ALIGN * ALIGN, LEAST)

    def _build(self) -> None:
        self._buckets = self._bucketed() if self.common.streams else []
        self._locals()
        self._check_memory()
        device = torch.device("cuda", torch.cuda.current_device()) if self._wire_on_gpu() else None
        groups: list[tuple[list[Stream], list[Piece]]]
        if self._buckets:
            groups = [self._of_bucket(k) for k in range(len(self._buckets))]
        else:
            groups = [(self.routes.streams, self.routes.here)]
        self.passes = [
            Traffic(
                streams,
                self.talk.rank,
                self.own,
                self.wire,
                self.capacity,
                self.want.sums[1],
                device,
            )
            for streams, _ in groups
        ]
        self._direct = [self._direct_plan(here) for _, here in groups]
        self._watch()
        self.summary = self._summary()

    def _wire_on_gpu(self) -> bool:
        kinds = {device.type for device in self.talk.group._device_types}
        return "cuda" in kinds and (self.common.cuda or "cpu" not in kinds)

    def _locals(self) -> None:
        """The local tensors of every write: of destinations, of sources."""
        dst = [_held(t) for t in self._spreads]
        if self.talk.rank in self.common.streams:
            dst = self._bucket_tensors()
        src = [_held(t) if isinstance(t, Spread) else t for t in self.resolved.source_tensors]
        self._dst_tensors = dst
        self.own = Locals(
            [dst[w.dst] for w in self.resolved.writes], [src[w.src] for w in self.resolved.writes]
        )

    def _direct_plan(self, here: Sequence[Piece]) -> Any:
        """What this rank holds itself, and what rules fill with."""
        resolved, rank = self.resolved, self.talk.rank
        dsts: list[Any] = []
        srcs: list[Any] = []
        numbers: dict[tuple[bool, int], int] = {}
        writes: list[Write] = []

        def number(tensor: Any, listed: list[Any]) -> int:
            key = (listed is dsts, id(tensor))
            if key not in numbers:
                numbers[key] = len(listed)
                listed.append(tensor)
            return numbers[key]

        for i, box in here:
            dst, src = self.own.dst[i], self.own.src[i]
            to, from_ = placed(box.first, dst.stride()), placed(box.second, src.stride())
            writes.append(Write(number(dst, dsts), number(src, srcs), box.sizes, *to, *from_))
        if resolved.made and rank in self.common.dst.ranks and not self._buckets:
            first = len(resolved.source_tensors) - resolved.made
            made = [w for w in resolved.writes if w.src >= first]
            cut = localize(replace(resolved, writes=made, ties=[]))
            for w in cut.writes:
                source = cut.source_tensors[w.src]
                if isinstance(source, Constant):
                    source = source.beside()
                    cut.source_tensors[w.src] = source
                dst = cut.destinations[w.dst].tensor
                writes.append(replace(w, dst=number(dst, dsts), src=number(source, srcs)))
        if not writes:
            return None
        active = backend.active()
        if any(isinstance(s, Lazy) for s in srcs):
            return Streamed(active, dsts, srcs, writes, [], self.want.options.staging)
        plain = [w.plain(w.dst, w.src) for w in writes]
        return active.Plan(dsts, srcs, plain, [], False, False)

    def _check_memory(self) -> None:
        """No element is written twice, and nothing that is read or sent is written."""
        if self.talk.rank in self.common.streams:
            return  # the bucket is memory of its own, used again and again
        written = {w.dst for w in self.resolved.writes}
        spans: list[tuple[int, int, bool, str]] = []
        for k, d in enumerate(self.resolved.destinations):
            if k in written and self._dst_tensors[k] is not None:
                spans.append((*_span(self._dst_tensors[k]), True, d.name))
        seen: set[int] = set()
        for i, tensor in enumerate(self.own.src):
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                name = self.resolved.source_names[self.resolved.writes[i].src]
                spans.append((*_span(tensor), False, name))
        findings = []
        # That the writes of one tensor do not meet is proved; here tensors must not.
        ends: dict[bool, tuple[int, str]] = {True: (0, ""), False: (0, "")}
        for begin, end, is_dst, name in sorted(s for s in spans if s[0] < s[1]):
            for other in (True, False) if is_dst else (True,):
                if begin >= ends[other][0]:
                    continue
                pair = (name, ends[other][1]) if is_dst else (ends[other][1], name)
                findings.append(
                    Finding(
                        pair[0],
                        "conflict",
                        f"memory that is also that of {pair[1]}{'' if other and is_dst else ', which is read'}",
                        "tensors apart from each other",
                        "clone() one of them",
                    )
                )
            ends[is_dst] = max(ends[is_dst], (end, name))
        if findings:
            raise plan_error(findings)

    # -- buckets --

    def _bucketed(self) -> list[list[int]]:
        """Destinations by bucket, in the order of the writes."""
        limit = self.capacity
        d = self.common.dst.description
        out: list[list[int]] = []
        at = 0
        for k in dict.fromkeys(w.dst for w in self.resolved.writes):
            size = _aligned(prod(d.shapes[k]) * d.dtypes[k].itemsize)
            if not out or at + size > limit:
                out.append([])
                at = 0
            out[-1].append(k)
            at += size
        return out

    def _of_bucket(self, k: int) -> tuple[list[Stream], list[Piece]]:
        own = set(self._buckets[k])
        writes = self.resolved.writes
        streams = [
            Stream(s.sender, s.receivers, [p for p in s.pieces if writes[p.write].dst in own])
            for s in self.routes.streams
        ]
        here = [p for p in self.routes.here if writes[p.write].dst in own]
        return [s for s in streams if s.pieces], here

    def _bucket_tensors(self) -> list[Any]:
        """Memory for one bucket, and all tensors as views of it."""
        d = self.common.dst.description
        self.entries: list[tuple[Entry, ...]] = []
        most = 0
        for own in self._buckets:
            at, entries = 0, []
            for k in own:
                entries.append(Entry(d.names[k], d.dtypes[k], d.shapes[k], at))
                at += _aligned(prod(d.shapes[k]) * d.dtypes[k].itemsize)
            most = max(most, at)
            self.entries.append(tuple(entries))
        device = "cuda" if self._wire_on_gpu() else "cpu"
        self.buffer = torch.empty(most, dtype=torch.uint8, device=device)
        out: list[Any] = [None] * len(d.names)
        for own, entries_ in zip(self._buckets, self.entries):
            views = Bucket(self.buffer, entries_).tensors()
            for k, (_, view) in zip(own, views):
                out[k] = view
        return out

    def bucket(self, k: int) -> Bucket:
        """What the pass of this number brought."""
        entries = self.entries[k]
        last = entries[-1]
        end = last.offset + prod(last.shape) * last.dtype.itemsize
        return Bucket(self.buffer[:end], entries)

    # -- running --

    def _watch(self) -> None:
        """What has to be as it was, for the plans to run again."""
        written = {w.dst for w in self.resolved.writes}
        slots: list[Any] = []
        self._slot_names: list[str] = []
        listed = [(self.dst, self.want.model, written), (self.src, self.want.source, None)]
        self._wrapped: list[Any] = []
        self._own_locals: list[Any] = []
        self._bumped: list[Any] = []
        for side, given, chosen in listed:
            if side is None:
                continue
            found = side.destinations
            if chosen is not None:
                found = [d for k, d in enumerate(found) if k in chosen]
            table = given if isinstance(given, dict) else None
            more, names = slots_of(found, table)
            slots += more
            self._slot_names += names
            sharded = [t for t in (d.tensor for d in found) if hasattr(t, "_local_tensor")]
            self._wrapped += sharded
            if chosen is not None:
                self._bumped += sharded
        self._own_locals = list(map(attrgetter("_local_tensor"), self._wrapped))
        self._slots = backend.active().Plan([], [], [], slots, False, False)

    def check(self) -> None:
        """Raise if something is not what it was compiled for, or values should not be written.

        Raises:
            PlanError: nothing was sent.
        """
        findings = [
            Finding(
                self._slot_names[k],
                "replaced",
                "another object in the model",
                "the one planned for",
                "make it again, or rebuild()",
            )
            for k in self._slots.replaced()
        ]
        now = map(attrgetter("_local_tensor"), self._wrapped)
        if not all(map(is_, now, self._own_locals)):
            findings.append(
                Finding(
                    "shards",
                    "moved",
                    "other local tensors of DTensors",
                    "those planned for",
                    "rebuild()",
                )
            )
        for found in self._plans():
            dsts, srcs = found.moved()
            if dsts or srcs:
                findings.append(
                    Finding(
                        "tensors",
                        "moved",
                        "other memory or another layout",
                        "as planned for",
                        "rebuild()",
                    )
                )
                break
        gathered = unsharded_finding(self.want.model)
        if gathered is not None:
            findings.append(gathered)
        if not findings and (self._ties or self.want.options.overflow == "error"):
            findings += self._value_findings()
        if findings:
            raise PlanError("the transfer no longer fits; nothing was sent.", findings)

    def _plans(self) -> Iterator[Any]:
        yield from (p for p in self._direct if p is not None)
        for traffic in self.passes:
            for found in traffic.rounds:
                yield from (p for p in (found.pack, found.unpack) if p is not None)

    def _value_findings(self) -> list[Finding]:
        resolved = self.resolved
        own = replace(resolved, ties=self._ties)
        findings = tie_findings(own, resolved.source_tensors, self.want.options.staging // 2)
        if self.want.options.overflow != "error":
            return findings
        mine = [p for s in self.routes.streams if s.sender == self.talk.rank for p in s.pieces]
        lost: dict[str, Finding] = {}
        for i, box in (*mine, *self.routes.here):
            w, source, dtype = resolved.writes[i], self.own.src[i], self.dst_dtypes[i]
            name = self.names[i]
            if name in lost or not may_overflow(source.dtype, dtype, source.device.type):
                continue
            view = view_of(source, box.sizes, *placed(box.second, source.stride()))
            bad = overflows(dtype, view)
            if bad is not None:
                lost[name] = overflow_finding(name, resolved.source_names[w.src], dtype, bad)
        return [*findings, *lost.values()]

    def run(self, version: int, course: Course, progress: Progress | None) -> Iterator[int]:
        """One pass after the other; yields the number of each once it is done.

        Raises:
            SyncError: a rank could not be reached.
        """
        if self._bumped:
            torch.autograd.graph.increment_version(self._bumped)
        for k, traffic in enumerate(self.passes):
            Run(
                self.talk,
                traffic,
                version,
                lambda k=k: self._run_direct(k),  # type: ignore[misc]
                self.names,
                self.dst_dtypes,
                self.want.sums,
                progress,
                course,
            ).run()
            yield k

    def _run_direct(self, k: int) -> None:
        found = self._direct[k]
        if found is not None and not found.run(None):
            raise PlanError("a tensor was moved while it was written.")

    def unwritten(self, course: Course) -> tuple[list[str], list[str]]:
        """Names of this rank that hold the new values in full, and of the others, after a failure."""
        left: dict[str, None] = {}
        for traffic in self.passes:
            done = set(course.unpacked) if len(self.passes) == 1 else set()
            for found in traffic.rounds:
                if found.number in done:
                    continue
                for _, _, message in found.receives:
                    left.update((self.names[part.piece.write], None) for part in message.parts)
        if not course.begun:
            left.update((self.names[i], None) for i, _ in self.routes.here)
        left.update((self.names[i], None) for i in course.wrong)
        return [n for n in self.summary.names if n not in left], list(left)

    def _summary(self) -> Summary:
        resolved, rank = self.resolved, self.talk.rank
        received = [p for s in self.routes.streams if rank in s.receivers for p in s.pieces]
        mine = [*self.routes.here, *received]
        n = written = read = 0
        names: dict[str, None] = {}
        casts: dict[tuple[str, str], Cast] = {}
        for i, box in mine:
            w, count = resolved.writes[i], prod(box.sizes)
            src, dst = resolved.source_tensors[w.src].dtype, self.dst_dtypes[i]
            n += count
            written += count * dst.itemsize
            read += count * self.wire[i].itemsize
            names[self.names[i]] = None
            if src != dst:
                source = resolved.source_names[w.src]
                cast = Cast(self.names[i], source, dtype_text(src), dtype_text(dst))
                casts[self.names[i], source] = cast
        first = len(resolved.source_tensors) - resolved.made
        if rank in self.common.dst.ranks:
            for k, w in enumerate(resolved.writes):
                if w.src >= first:
                    names[self.names[k]] = None
        routes = {"held here": len(self.routes.here), "received": len(received)}
        return Summary(
            tuple(names),
            len(mine),
            n,
            written,
            written + read,
            tuple(casts.values()),
            (*resolved.kept, *(f"{name} (in part)" for name in resolved.partial)),
            tuple(resolved.dropped),
            routes,
            backend.active().NAME,
        )


@contextmanager
def paused_collection() -> Iterator[None]:
    """No garbage collection meanwhile: of tens of thousands of new tuples none is garbage, and looking costs
    as much as making them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _describe(talk: Talk, want: Want) -> tuple[Tensors | None, Tensors | None]:
    gathered = unsharded_finding(want.model) or unsharded_finding(want.source)
    if gathered is not None:
        raise plan_error([gathered])
    dst = src = None
    if want.model is not None:
        dst = describe_model(want.model, talk.ranks, talk.rank)
        meta = [d.name for d in dst.destinations if d.tensor.is_meta]
        if meta and not want.stream:
            raise plan_error(
                [
                    Finding(
                        name,
                        "meta",
                        "a meta destination, which has no memory",
                        "a tensor with memory",
                        "module.to_empty(device=...), or stream=True to take it from weights()",
                    )
                    for name in meta
                ]
            )
    if want.source is not None:
        src = describe_source(want.source, talk.ranks, talk.rank)
    return dst, src


def _held(spread: Spread) -> Any:
    return next((part.held for part in spread.parts if part.held is not None), None)


def _is_here(spread: Spread) -> bool:
    held = [prod(part.shape) for part in spread.parts if part.held is not None]
    return sum(held) >= spread.numel()


def _in_full(common: Common, source: int) -> set[int]:
    """Ranks that hold all of a source."""
    shape = common.src.description.shapes[source]
    shards = shards_of(common.src.held[source], shape)
    whole = [s for s in shards if prod(sum(g.length for g in a) for a in s.axes) == prod(shape)]
    return {rank for shard in whole for rank in shard.ranks}


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first to behind the last element."""
    if not tensor.numel() or tensor.device.type != "cpu":
        return 0, 0
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * tensor.element_size()
    return begin, begin + reach(tensor.shape, tensor.stride()) * tensor.element_size()


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
