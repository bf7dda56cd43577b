"""A transfer, compiled on one rank: what all ranks agreed on, this rank's messages, and one pass over them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..before import tie_findings
from ..boxes import placed
from ..casting import may_overflow, overflow_finding, overflows
from ..destinations import Destination
from ..errors import Finding, PlanError
from ..fills import Constant, Mean
from ..localize import local_tensor, localize
from ..options import Options
from ..pieces import view_of
from ..resolve import Tie, Write, plan_error, resolve
from ..sharding import unsharded_finding
from ..sources.lazy import Lazy
from ..sources.spread import Spread, SpreadPart, whole_axes
from ..stream import Streamed
from ..torn import Torn
from .agree import Common, agree_on
from .buckets import Buckets
from .layout import Tensors, describe_model, describe_source, shards_of, spreads
from .routes import Piece, Stream, degree, route
from .run import Course, Run
from .summary import summary_of_work
from .talk import Talk
from .traffic import ALIGN, HEADER, Locals, Traffic, wire_dtype
from .watch import Watch, meeting_findings

__all__ = ["Want", "Work"]

Progress = Callable[[int, int], object]
# A message of less would be all header and latency.
LEAST = 4096

_last_number = 0


def _numbered(number: int) -> int:
    """The number of a new transfer, higher than all those of its ranks."""
    global _last_number
    _last_number = max(_last_number, number)
    return number


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
        for name in ("identity", "casting", "overflow"):
            said[name] = repr(getattr(o, name))
        for name in ("allow_missing", "allow_unexpected"):
            allowed = getattr(o, name)
            # A set has another order in each process.
            said[name] = repr(allowed if isinstance(allowed, str) else sorted(map(str, allowed)))
        said["staging"] = repr(o.staging)
        said["bucket_bytes"] = repr(self.capacity)
        said["checksum"] = repr(self.sums)
        return said


class Work:
    """Compiled on every rank of a group together.

    Args:
        talk: the group.
        want: what this rank asks for.
        doing: for errors: "planning".

    Raises:
        SyncError: on every rank.

    Attributes:
        number: the same on all ranks, and of no other transfer of one of them.
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
        said = talk.collected(doing, lambda: (self._resolve(), _last_number))
        self.capacity = self._capacity(max(most for most, _ in said))
        self.number = _numbered(max(last for _, last in said) + 1)
        talk.together(doing, self._build)

    def _resolve(self) -> int:
        """Returns how many messages this rank has on the way at once."""
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
        if common.streams:
            findings += [
                Finding(name, "kept", "written in part", "all of a tensor that a stream gives out")
                for name in self.resolved.partial
            ]
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
        return degree(self.routes.streams, self.talk.rank)

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
                if not tensor.source.is_here():
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
            if a.is_here() and b.is_here():
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
        device = torch.device("cuda", torch.cuda.current_device()) if self._wire_on_gpu() else None
        self._locals(device or torch.device("cpu"))
        groups = [self._of_pass(k) for k in range(1 if self.buckets is None else len(self.buckets))]
        own, wire, sums = self.own, self.wire, self.want.sums[1]
        self.passes = [
            Traffic(streams, self.talk.rank, own, wire, self.capacity, sums, device)
            for streams, _, _ in groups
        ]
        self._direct = [self._direct_plan(here, made) for _, here, made in groups]
        written = {w.dst for w in self.resolved.writes}
        dsts = [] if self.dst is None else self.dst.destinations
        self._watch = Watch(
            ([d for k, d in enumerate(dsts) if k in written], self.want.model),
            ([] if self.src is None else self.src.destinations, self.want.source),
        )
        self.summary = summary_of_work(self)

    def _wire_on_gpu(self) -> bool:
        kinds = {device.type for device in self.talk.group._device_types}
        return "cuda" in kinds and (self.common.cuda or "cpu" not in kinds)

    def _locals(self, device: torch.device) -> None:
        """The local tensors of every write: of destinations, of sources."""
        resolved, common = self.resolved, self.common
        self.buckets: Buckets | None = None
        if common.streams:
            order = dict.fromkeys(w.dst for w in resolved.writes)
            self.buckets = Buckets(common.dst.description, order, self.capacity)
            if self.talk.rank in common.streams:
                for k, view in self.buckets.allocate(device).items():
                    spread = self._spreads[k]
                    part = SpreadPart(whole_axes(tuple(spread.shape)), view)
                    self._spreads[k] = Spread(spread.shape, spread.dtype, (part,), spread.key)
                    resolved.destinations[k].tensor = self._spreads[k]
        dst = list(map(local_tensor, self._spreads))
        src = list(map(local_tensor, resolved.source_tensors))
        self.own = Locals(
            [dst[w.dst] for w in resolved.writes], [src[w.src] for w in resolved.writes]
        )
        if self.talk.rank in common.streams:
            return  # buckets are memory of their own, used again and again
        written = {w.dst: resolved.destinations[w.dst].name for w in resolved.writes}
        findings = meeting_findings(
            [(name, dst[k]) for k, name in written.items() if dst[k] is not None],
            [(n, t) for n, t in zip(resolved.source_names, src) if isinstance(t, Tensor)],
        )
        if findings:
            raise plan_error(findings)

    def _of_pass(self, k: int) -> tuple[list[Stream], list[Piece], list[Write]]:
        """What is sent, what is copied here, and what rules fill with, in one pass."""
        resolved, routes = self.resolved, self.routes
        first = len(resolved.source_tensors) - resolved.made
        made = [w for w in resolved.writes if w.src >= first]
        if self.buckets is None:
            return routes.streams, routes.here, made
        own = set(self.buckets.numbers[k])
        streams = [
            Stream(
                s.sender, s.receivers, [p for p in s.pieces if resolved.writes[p.write].dst in own]
            )
            for s in routes.streams
        ]
        return (
            [s for s in streams if s.pieces],
            [p for p in routes.here if resolved.writes[p.write].dst in own],
            [w for w in made if w.dst in own],
        )

    def _direct_plan(self, here: Sequence[Piece], made: Sequence[Write]) -> Any:
        """What this rank holds itself, and what rules fill with."""
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
        if made and self.talk.rank in self.common.dst.ranks:
            cut = localize(replace(self.resolved, writes=list(made), ties=[]))
            filled = [t.beside() if isinstance(t, Constant) else t for t in cut.source_tensors]
            for w in cut.writes:
                dst = number(cut.destinations[w.dst].tensor, dsts)
                writes.append(replace(w, dst=dst, src=number(filled[w.src], srcs)))
        if not writes:
            return None
        active = backend.active()
        if any(isinstance(s, Lazy) for s in srcs):
            return Streamed(active, dsts, srcs, writes, [], self.want.options.staging)
        return active.Plan(dsts, srcs, [w.plain(w.dst, w.src) for w in writes], [], False, False)

    # -- running --

    def check(self) -> None:
        """Raise if something is not what it was compiled for, or values should not be written.

        Raises:
            PlanError: nothing was sent.
        """
        findings = self._watch.findings()
        for found in self._plans:
            dsts, srcs = found.moved()
            if dsts or srcs:
                findings += self._moved(found, dsts, srcs)
        if findings:  # gathered parameters are other objects: that is then what there is to say
            models = (self.want.model, self.want.source)
            gathered = [f for f in map(unsharded_finding, models) if f is not None]
            findings = gathered or findings
        if not findings and (self._ties or self.want.options.overflow == "error"):
            findings += self._value_findings()
        if findings:
            raise PlanError("the transfer no longer fits; nothing was sent.", findings)

    def _moved(self, found: Any, dsts: Sequence[int], srcs: Sequence[int]) -> list[Finding]:
        """Which tensors of a plan are no longer what it was compiled for."""
        resolved = self.resolved
        names = {id(t): name for t, name in zip(self.own.dst, self.names)}
        names |= {
            id(self.own.src[i]): resolved.source_names[w.src] for i, w in enumerate(resolved.writes)
        }
        gone = [found.destinations()[k] for k in dsts] + [found.sources()[k] for k in srcs]
        text = "other memory or another layout"
        return [
            Finding(names.get(id(t), "a buffer"), "moved", text, "as planned for", "rebuild()")
            for t in gone
        ]

    @cached_property
    def _plans(self) -> list[Any]:
        rounds = [found for traffic in self.passes for found in traffic.rounds]
        made = [*self._direct, *(p for r in rounds for p in (r.pack, r.unpack))]
        return [p for p in made if p is not None]

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
        try:
            self._watch.bump()
        except BaseException as error:
            course.fail(error)
        for k, traffic in enumerate(self.passes):
            Run(
                self.talk,
                traffic,
                version,
                None if self._direct[k] is None else partial(self._run_direct, k),
                self.names,
                self.dst_dtypes,
                self.want.sums,
                progress,
                course,
            ).run()
            yield k

    def _run_direct(self, k: int) -> None:
        if not self._direct[k].run(None):
            raise PlanError("a tensor was moved while it was written.")

    def unwritten(self, course: Course) -> tuple[list[str], list[str]]:
        """Names of this rank that hold the new values in full, and of the others, after a failure."""
        left: dict[str, None] = {}
        for found in [found for traffic in self.passes for found in traffic.rounds][
            course.unpacked :
        ]:
            for _, _, message in found.receives:
                left.update((self.names[part.piece.write], None) for part in message.parts)
        if course.direct < len(self.passes):
            first = len(self.resolved.source_tensors) - self.resolved.made
            made = [i for i, w in enumerate(self.resolved.writes) if w.src >= first]
            left.update((self.names[i], None) for i in (*(i for i, _ in self.routes.here), *made))
        left.update((self.names[i], None) for i in course.wrong)
        return [n for n in self.summary.names if n not in left], list(left)


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
        if want.stream:
            _check_whole(dst)
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


def _check_whole(asked: Tensors) -> None:
    """Raise where a stream is asked for a part of a tensor.

    Raises:
        PlanError: a DTensor.
    """
    findings = [
        Finding(
            d.name,
            "layout",
            "a DTensor, of which a rank has a part",
            "a tensor, perhaps on the meta device: a stream gives out whole ones",
            "pass a model without stream=True to have its shards written",
        )
        for d, spread in zip(asked.destinations, asked.spreads, strict=True)
        if spread is not None
    ]
    if findings:
        raise plan_error(findings)


def _in_full(common: Common, source: int) -> set[int]:
    """Ranks that hold all of a source."""
    shape = common.src.description.shapes[source]
    shards = shards_of(common.src.held[source], shape)
    whole = [s for s in shards if prod(sum(g.length for g in a) for a in s.axes) == prod(shape)]
    return {rank for shard in whole for rank in shard.ranks}
