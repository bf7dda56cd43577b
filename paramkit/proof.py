"""The proof that a set of writes is right: nothing twice, nothing forgotten, nothing left over.

Every element of every destination is written once, or kept on purpose; every element of every source is
read, or dropped on purpose. Counting elements does not prove that (a part loaded twice makes up for one
that never was), so the regions themselves are compared, exactly, for any strides.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from .destinations import memory_key
from .errors import Finding, Suggester
from .hints import Counterparts, did_you_mean, nearest_template
from .patterns import View
from .regions import Region, cover, missing_text

if TYPE_CHECKING:
    from .resolve import Resolver, Write

__all__ = ["Part", "Proof"]


class Part(NamedTuple):
    """A part of a tensor that a rule keeps or drops on purpose.

    Attributes:
        view: which part.
        rule: the rule, as text.
        whole: the rule names the whole tensor.
    """

    view: View
    rule: str
    whole: bool


class Proof:
    """What is written, read, kept and dropped so far, and the verdict on it at the end.

    Attributes:
        consumed: sources that some rule or the identity reads, or tries to.
        reached: destinations that some rule or the identity writes, or tries to.
        failed: destinations, and `unread_ok` sources, with a finding of their own: coverage says nothing new.
        dropped, kept: sources dropped and destinations kept as a whole, and the part that says so.
        ties: pairs of writes of the same elements.
        also: names of the source that are other names of memory that is read, and the name it is read under.
    """

    def __init__(self, resolver: Resolver) -> None:
        self._held_by = weakref.ref(
            resolver
        )  # not a cycle: sources hold files, which are closed with them
        self.consumed: set[int] = set()
        self.reached: set[int] = set()
        self.failed: set[int] = set()
        self.unread_ok: set[int] = set()
        self.dropped: dict[int, Part] = {}
        self.kept: dict[int, Part] = {}
        self.ties: list[tuple[Write, Write]] = []
        self.also: dict[str, str] = {}
        self._writes: dict[int, list[Write]] = {}
        self._regions: dict[tuple[object, ...], Write] = {}
        self._reads: dict[int, list[Write]] = {}
        self._kept_parts: dict[int, list[Part]] = {}
        self._dropped_parts: dict[int, list[Part]] = {}

    @property
    def _resolver(self) -> Resolver:
        resolver = self._held_by()
        assert resolver is not None
        return resolver

    # -- what is found out on the way --

    def take(self, write: Write) -> bool:
        """Note a write. False where it is the same elements again: once is enough if the values agree."""
        if write.src >= 0:
            self._reads.setdefault(write.src, []).append(write)
        others = self._writes.setdefault(write.dst, [])
        if write.src >= 0 and 0 not in write.sizes:
            region = (write.dst, *_region(write))
            first = self._regions.setdefault(region, write)
            if first is not write:
                # Also where both are one memory: the next source of the plan may be another.
                self.ties.append((first, write))
                return False
        others.append(write)
        return True

    def tie(self, write: Write, other: Write) -> None:
        """Note that two parts of sources must hold the same values."""
        self._reads.setdefault(other.src, []).append(other)
        if 0 not in write.sizes:
            self.ties.append((write, other))

    def keep(self, d: int, part: Part) -> None:
        """Note a destination, or a part of it, that is kept on purpose."""
        if part.whole:
            self.kept.setdefault(d, part)
        else:
            self._kept_parts.setdefault(d, []).append(part)

    def drop(self, s: int, part: Part) -> None:
        """Note a source, or a part of it, that is dropped on purpose."""
        if part.whole:
            self.dropped.setdefault(s, part)
        else:
            self._dropped_parts.setdefault(s, []).append(part)

    def whole(self, d: int, writes: Sequence[Write]) -> bool:
        """Whether some writes, and what is kept on purpose, are all of a destination."""
        parts = self._kept_parts.get(d, [])
        regions = [*map(_region, writes), *map(_part_region, parts)]
        return not cover(_whole(self._resolver.destinations[d].tensor), regions).missing

    # -- the verdict --

    def run(self) -> tuple[list[str], list[str], list[str]]:
        """Findings go to the resolver.

        Returns:
            (destinations kept, destinations kept in part, sources dropped), by name.
        """
        self._contradictions()
        kept, partial = self._destinations()
        return kept, partial, self._sources()

    def _add(self, *args: str) -> None:
        self._resolver.findings.append(Finding(*args))

    def _contradictions(self) -> None:
        r = self._resolver
        for s, part in self.dropped.items():
            if s in self.consumed:
                self._add(
                    r.src_names[s], "rule", f"dropped by {part.rule} and read by another rule"
                )
        for d, part in self.kept.items():
            if d in self.reached:
                name = r.destinations[d].name
                self._add(name, "rule", f"kept by {part.rule} and written by another rule")

    def _destinations(self) -> tuple[list[str], list[str]]:
        r = self._resolver
        allowed, idle = r.may_miss.select(r.dst_index)
        self._report_idle(idle, "allow_missing", "destination", r.dst_index)
        kept: list[str] = []
        partial: list[str] = []
        missing: list[int] = []
        for k, d in enumerate(r.destinations):
            if k in self.failed:
                continue
            writes, parts = self._writes.get(k), self._kept_parts.get(k)
            if writes is None and parts is None:
                if k in self.reached:
                    continue  # it has a finding already
                if d.transient and not (d.tensor.is_meta and r.device is not None):
                    continue  # no state dict has it: it is written where it is named
                may = k in self.kept or _any_of(d, allowed)
                if may:
                    kept.append(d.name)
                else:
                    missing.append(k)
                continue
            if writes is not None and parts is None and len(writes) == 1:
                if prod(writes[0].sizes) == d.tensor.numel():
                    continue  # one write of as many elements, each at a place of its own
            may = bool(allowed) and _any_of(d, allowed)
            if self._covered(k, writes or [], parts or [], may):
                partial.append(d.name)
                if d.tensor.is_meta:
                    self._add(
                        d.name,
                        "meta",
                        "written in part, and on the meta device",
                        "all of it: the rest would not be initialised",
                        "write the rest, or fill it",
                    )
        self._report_missing(missing)
        return kept, partial

    def _covered(self, k: int, writes: list[Write], parts: list[Part], may: bool) -> bool:
        """Judge a destination that is written in several parts; True if some of it is left alone."""
        d = self._resolver.destinations[k]
        space = _whole(d.tensor)
        regions = [*map(_region, writes), *map(_part_region, parts)]
        found = cover(space, regions)
        if found.twice is not None:
            said = [f"{d.name} <- {self._said(w)}" for w in writes]
            said += [f"{p.rule}, which keeps it" for p in parts]
            first, second = found.twice
            left = f", and {missing_text(space, regions)} by none" if found.missing else ""
            self._add(
                d.name,
                "conflict",
                f"both {said[first]} and {said[second]} write one element{left}"
                if first != second
                else f"{said[first]}, an element twice{left}",
                "each element written once",
                "drop one of them, or correct its at",
            )
        elif found.missing and not may:
            self._add(
                d.name,
                "kept",
                f"{found.covered} of {d.tensor.numel()} elements written, "
                f"not {missing_text(space, regions)}",
                "all of them",
                "write the rest, keep it with Rule(None, name, pattern, at), "
                "or name it in allow_missing",
            )
        return bool(parts) or found.missing > 0

    def _said(self, write: Write) -> str:
        r = self._resolver
        source = r.src_names[write.src] if write.src >= 0 else r.made[-1 - write.src][0]
        return f"{source} ({write.text})" if write.text else source

    def _report_missing(self, missing: Sequence[int]) -> None:
        if not missing:
            return
        r = self._resolver
        counterparts = Counterparts(
            {
                name: tuple(r.src_tensors[s].shape)
                for s, name in enumerate(r.src_names)
                if s not in self.consumed and s not in self.dropped
            },
            {r.destinations[k].name: tuple(r.destinations[k].tensor.shape) for k in missing},
        )
        for k in missing:
            name = r.destinations[k].name
            hint = counterparts.hint(name) or (
                "give it a source, keep it with Rule(None, name), or name it in allow_missing"
            )
            self._add(name, "missing", "", "", hint)

    def _sources(self) -> list[str]:
        r = self._resolver
        allowed, idle = r.may_remain.select(r.src_names)
        self._report_idle(idle, "allow_unexpected", "source", r.src_names)
        dropped: list[str] = []
        unexpected: list[int] = []
        for s, name in enumerate(r.src_names):
            if s in self.unread_ok:
                continue
            may = s in self.dropped or name in allowed
            reads, parts = self._reads.get(s), self._dropped_parts.get(s)
            if reads is None and parts is None:
                if s in self.consumed:
                    continue
                if may:
                    dropped.append(name)
                else:
                    unexpected.append(s)
                continue
            self._read_in_full(s, reads or [], parts or [], may)
            if parts:
                dropped.append(f"{name} (in part)")
        if unexpected and not r.streaming:
            # Tied: what is read under one name is read, under whatever other names it stands. An iterator may
            # give different tensors in the same memory.
            read = {memory_key(r.src_tensors[s]): s for s in self._reads}
            for s in unexpected:
                reader = read.get(memory_key(r.src_tensors[s]))
                if reader is not None:
                    self.also[r.src_names[s]] = r.src_names[reader]
            unexpected = [s for s in unexpected if r.src_names[s] not in self.also]
        self._report_unexpected(unexpected)
        return dropped

    def _read_in_full(self, s: int, reads: list[Write], parts: list[Part], may: bool) -> None:
        tensor = self._resolver.src_tensors[s]
        if len(reads) == 1 and not parts:
            read = prod(n for n, st in zip(reads[0].sizes, reads[0].src_strides, strict=True) if st)
            if read == tensor.numel() and 0 not in tensor.stride():
                return
        space = _whole(tensor)
        regions = [Region(w.src_offset, w.sizes, w.src_strides) for w in reads]
        regions += map(_part_region, parts)
        found = cover(space, regions)
        if found.missing and not may:
            self._add(
                self._resolver.src_names[s],
                "unread",
                f"{found.covered} of {found.covered + found.missing} elements read, "
                f"not {missing_text(space, regions)}",
                "all of them",
                "read the rest, drop it with Rule(name, None, pattern, at), "
                "or name it in allow_unexpected",
            )

    def _report_unexpected(self, unexpected: Sequence[int]) -> None:
        if not unexpected:
            return
        r = self._resolver
        counterparts = Counterparts(
            {
                name: tuple(d.tensor.shape)
                for k, d in enumerate(r.destinations)
                if k not in self.reached
                for name in (d.name, *d.aliases)
            },
            {r.src_names[s]: tuple(r.src_tensors[s].shape) for s in unexpected},
        )
        for s in unexpected:
            name = r.src_names[s]
            hint = counterparts.hint(name) or (
                "drop it with Rule(name, None), or name it in allow_unexpected"
            )
            self._add(name, "unexpected", "", "", hint)

    def _report_idle(
        self, idle: Sequence[str], argument: str, what: str, names: Iterable[str]
    ) -> None:
        if not idle:
            return
        near = Suggester(names)
        for text in idle:
            self._add(
                f'{argument} "{text}"',
                "rule",
                "no match",
                f"at least one {what} name",
                did_you_mean(nearest_template(text, near)),
            )


def _any_of(destination: Any, names: Any) -> bool:
    return any(name in names for name in (destination.name, *destination.aliases))


def _region(write: Write) -> Region:
    return Region(write.dst_offset, write.sizes, write.dst_strides)


def _part_region(part: Part) -> Region:
    return Region(part.view.offset, part.view.sizes, part.view.strides)


def _whole(tensor: Any) -> Region:
    return Region(0, tuple(tensor.shape), tuple(tensor.stride()))
