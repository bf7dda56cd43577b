"""From writes of whole tensors to writes of the parts that this process holds.

Names, rules and the proof know whole tensors only. Here every write is cut by the parts of its destination
that are held here, and of its source. What this process writes, it must be able to read.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch

from .boxes import Box, Geometry, boxes, clip, elements, placed
from .destinations import Destination
from .errors import Finding
from .fills import Mean
from .pieces import view_of
from .resolve import Resolved, Tie, Write, plan_error
from .sharding import Axes, axes_by_rank, is_sharded, place_of, spread_finding, spread_of
from .sources.spread import Spread, SpreadPart

__all__ = ["local_pairs", "local_tensor", "local_writes", "localize"]

_HINT = "paramkit.distributed.plan moves what other ranks hold"


class _Piece(NamedTuple):
    """A box of a write: which part of the destination and of the source, and where in them."""

    first: int
    second: int
    geometry: Geometry


def localize(resolved: Resolved) -> Resolved:
    """The writes of this process, on tensors that it holds.

    Args:
        resolved: whole tensors, some of them `Spread`.

    Returns:
        The same, with a destination's tensor being its local one. Where no tensor is in parts, the argument.

    Raises:
        PlanError: a value that is written here is held elsewhere.

    Example:
        >>> import torch
        >>> from paramkit.resolve import resolve
        >>> from paramkit.sources.spread import Segment, SpreadPart
        >>> lower = SpreadPart(((Segment(2, 2, 0),), (Segment(0, 3, 0),)), torch.zeros(2, 3))
        >>> model = {"w": Spread((4, 3), torch.float32, [lower])}
        >>> made = localize(resolve(model, {"w": torch.ones(4, 3)}))
        >>> made.writes[0].sizes, made.writes[0].src_offset
        ((2, 3), 6)
    """
    dsts = [d.tensor for d in resolved.destinations]
    srcs = resolved.source_tensors
    if not any(isinstance(t, Spread) for t in (*dsts, *srcs)):
        return resolved
    return _Localizer(resolved, dsts, srcs).run()


def local_pairs(
    dsts: Sequence[Any], srcs: Sequence[Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pairs of tensors of equal shapes, with the local views of DTensors in place of them.

    Left as they are: pairs of two DTensors of different placements or meshes, whose copy all ranks do together.

    Args:
        dsts: tensors, some of them DTensors.
        srcs: DTensors, or whole tensors.

    Raises:
        PlanError: a DTensor that cannot be written or read here.
    """
    out_dsts: list[torch.Tensor] = []
    out_srcs: list[torch.Tensor] = []
    cut = Resolved()
    for dst, src in zip(dsts, srcs, strict=True):
        together = is_sharded(src) and (
            not is_sharded(dst)
            or (src.device_mesh, src.placements) != (dst.device_mesh, dst.placements)
        )
        if together or not is_sharded(dst):
            out_dsts.append(dst)
            out_srcs.append(src)
            continue
        n = len(cut.destinations)
        spread, source = spread_of(dst), spread_of(src) if is_sharded(src) else src
        findings = [spread_finding(f"pair {n}", spread, True)]
        if isinstance(source, Spread):
            findings.append(spread_finding(f"pair {n}", source, False))
        if any(findings):
            raise plan_error([f for f in findings if f is not None])
        cut.destinations.append(Destination(f"pair {n}", spread, None, "", "tensor"))
        cut.source_names.append(f"pair {n}")
        cut.source_tensors.append(source)
        strides: Any = source.stride()
        cut.writes.append(Write(n, n, tuple(dst.shape), spread.strides, 0, strides, 0))
    cut = localize(cut)
    for w in cut.writes:
        out_dsts.append(
            view_of(cut.destinations[w.dst].tensor, w.sizes, w.dst_strides, w.dst_offset)
        )
        out_srcs.append(view_of(cut.source_tensors[w.src], w.sizes, w.src_strides, w.src_offset))
    return out_dsts, out_srcs


def local_tensor(tensor: Any) -> Any:
    """Of a tensor in parts what this process holds, None for nothing; any other tensor itself."""
    if not isinstance(tensor, Spread):
        return tensor
    return next((part.held for part in tensor.parts if part.held is not None), None)


def local_writes(write: Write, dst: Any, src: Any, name: str) -> list[tuple[Any, Any, Write]]:
    """One write, cut by the parts of its two tensors.

    Returns:
        (destination, source, write between them), with local tensors.

    Raises:
        PlanError: a value that is written here is held elsewhere.
    """
    if not isinstance(dst, Spread) and not isinstance(src, Spread):
        return [(dst, src, write)]
    pieces, complete = _pieces(write.geometry, dst, src, False)
    if not complete:
        raise plan_error([_elsewhere(name, "the source")])
    out = []
    for first, second, cut in pieces:
        held = [
            t.parts[k].held if isinstance(t, Spread) else t
            for t, k in ((dst, first), (src, second))
        ]
        out.append((held[0], held[1], Write(write.dst, write.src, *cut, write.text)))
    return out


def _elsewhere(name: str, source: str) -> Finding:
    return Finding(
        name,
        "layout",
        f"values of {source} that another rank holds",
        "values that this rank can read",
        _HINT,
    )


class _Localizer:
    def __init__(self, resolved: Resolved, dsts: Sequence[Any], srcs: Sequence[Any]) -> None:
        self.resolved, self.dsts, self.srcs = resolved, dsts, srcs
        self.findings: list[Finding] = []
        self.names: list[str] = []
        self.tensors: list[Any] = []
        self.numbers: dict[tuple[int, int], int] = {}
        self.cuts: dict[Hashable, tuple[list[_Piece], bool]] = {}
        # With the places whose numbers are in the key, so that these are nobody else's.
        self.everywhere: dict[Hashable, tuple[bool, list[Any]]] = {}
        # Equal axes are one object nearly always; numbers stand for them in keys.
        self.kinds: dict[Hashable, int] = {}
        self.kind_of: dict[int, int] = {}

    def run(self) -> Resolved:
        r = self.resolved
        writes: list[Write] = []
        reads_made = len(r.source_tensors) - r.made
        later: list[tuple[Write, list[_Piece]]] = []
        for w in r.writes:
            pieces, complete = self._cut(w.geometry, self.dsts[w.dst], self.srcs[w.src])
            if not (complete and self._complete_elsewhere(w)):
                self._elsewhere(r.destinations[w.dst].name, w.src)
            later.append((w, pieces))
        later += self._untouched(later)
        # What rules fill with stays behind the tensors of the source.
        for made in (False, True):
            for w, pieces in later:
                if (w.src >= reads_made) is made:
                    for piece in pieces:
                        self._number(w.src, piece.second)
        ties = [tie for pair in r.ties for tie in self._tie(pair)]
        first_made = len(self.tensors)
        for w, pieces in later:
            writes += [self._write(w, piece) for piece in pieces]
        made_here = sum(1 for s, _ in self.numbers if s >= reads_made)
        if self.findings:
            raise plan_error(self.findings)
        assert first_made == len(self.tensors)
        return replace(
            r,
            destinations=[self._destination(d) for d in r.destinations],
            source_names=self.names,
            source_tensors=self.tensors,
            writes=writes,
            ties=ties,
            made=made_here,
        )

    def _untouched(
        self, found: Sequence[tuple[Write, list[_Piece]]]
    ) -> list[tuple[Write, list[_Piece]]]:
        """Writes of nothing into destinations of which nothing is held here.

        They are written all the same: a plan names them, sees that they were replaced, and sets whether they
        require grad, as on every other rank.
        """
        touched = {w.dst for w, pieces in found if pieces}
        rest = {w.dst: w for w, _ in reversed(found) if w.dst not in touched}
        nothing: Geometry = ((0,), (1,), 0, (1,), 0)
        return [
            (w, [_Piece(0, _first_held(self.srcs[w.src]), nothing)])
            for w in rest.values()
            if isinstance(self.dsts[w.dst], Spread)
        ]

    def _destination(self, d: Any) -> Any:
        if not isinstance(d.tensor, Spread):
            return d
        held = local_tensor(d.tensor)
        return replace(
            d, tensor=_nothing(d.tensor) if held is None else held, wrapper=d.tensor.wrapper
        )

    def _write(self, w: Write, piece: _Piece) -> Write:
        return Write(w.dst, self._number(w.src, piece.second), *piece.geometry, w.text)

    def _number(self, src: int, part: int) -> int:
        number = self.numbers.get((src, part))
        if number is None:
            number = self.numbers[src, part] = len(self.tensors)
            tensor = self.srcs[src]
            if isinstance(tensor, Mean):
                tensor = self._mean(src, tensor)
            self.names.append(self.resolved.source_names[src])
            if isinstance(tensor, Spread):
                tensor = tensor.parts[part].held if part >= 0 else _nothing(tensor)
            self.tensors.append(tensor)
        return number

    def _mean(self, src: int, mean: Mean) -> Mean:
        source = mean.source
        if isinstance(source, Spread) and not source.is_here():
            self._elsewhere(self.resolved.source_names[src], src)
        return mean

    def _tie(self, pair: Tie) -> list[Tie]:
        """The parts of two sources that must agree."""
        a, b = pair
        first, second = self.srcs[a.src], self.srcs[b.src]
        if not isinstance(first, Spread) and not isinstance(second, Spread):
            x, y = self._number(a.src, 0), self._number(b.src, 0)
            return [Tie(replace(a, src=x), replace(b, src=y))]
        if isinstance(first, Spread) and isinstance(second, Spread):
            same = (a.src_strides, a.src_offset) == (b.src_strides, b.src_offset)
            if same and first.location() == second.location():
                return []
        geometry = (a.sizes, a.src_strides, a.src_offset, b.src_strides, b.src_offset)
        pieces, complete = self._cut(geometry, first, second, all_of_first=True)
        if not complete:
            self._elsewhere(self.resolved.destinations[a.dst].name, b.src)
        out = []
        for piece in pieces:
            sizes, strides_a, offset_a, strides_b, offset_b = piece.geometry
            x, y = self._number(a.src, piece.first), self._number(b.src, piece.second)
            out.append(
                Tie(
                    replace(a, src=x, sizes=sizes, src_strides=strides_a, src_offset=offset_a),
                    replace(b, src=y, sizes=sizes, src_strides=strides_b, src_offset=offset_b),
                )
            )
        return out

    def _elsewhere(self, name: str, src: int) -> None:
        self.findings.append(_elsewhere(name, self.resolved.source_names[src]))

    # -- cutting --

    def _cut(
        self, geometry: Geometry, first: Any, second: Any, all_of_first: bool = False
    ) -> tuple[list[_Piece], bool]:
        """The pieces that are held here, and whether all that is needed is."""
        if not isinstance(first, Spread) and not isinstance(second, Spread):
            return [_Piece(0, 0, geometry)], True
        key = (geometry, self._kind(first), self._kind(second), all_of_first)
        found = self.cuts.get(key)
        if found is None:
            found = self.cuts[key] = _pieces(geometry, first, second, all_of_first)
        return found

    def _complete_elsewhere(self, w: Write) -> bool:
        """Whether the other ranks of a DTensor hold what they write: all ranks then say the same."""
        dst, src = self.dsts[w.dst], self.srcs[w.src]
        writer, reader = (t.wrapper if isinstance(t, Spread) else None for t in (dst, src))
        if reader is None or (writer is None and isinstance(dst, Spread)):
            return True
        geometry = w.geometry
        places = [place_of(t) for t in (writer, reader) if t is not None]
        key = (geometry, *map(id, places))
        found = self.everywhere.get(key)
        if found is None:
            held = axes_by_rank(reader)
            # A plain tensor is written in full by every rank that has it.
            written = dict.fromkeys(held) if writer is None else axes_by_rank(writer)
            shapes = None if writer is None else tuple(dst.shape), tuple(src.shape)
            complete = all(
                _holds(geometry, shapes, axes, held.get(rank)) for rank, axes in written.items()
            )
            found = self.everywhere[key] = complete, places
        return found[0]

    def _kind(self, tensor: Any) -> int:
        """Equal for tensors that are cut alike."""
        if not isinstance(tensor, Spread):
            return -1
        known = self.kind_of.get(id(tensor))
        if known is None:
            held = tuple(
                (p.axes, None if p.held is None else tuple(p.held.stride())) for p in tensor.parts
            )
            known = self.kinds.setdefault((tuple(tensor.shape), held), len(self.kinds))
            self.kind_of[id(tensor)] = known
        return known


def _pieces(
    geometry: Geometry, first: Any, second: Any, all_of_first: bool
) -> tuple[list[_Piece], bool]:
    shapes = [tuple(t.shape) if isinstance(t, Spread) else None for t in (first, second)]
    pieces: list[_Piece] = []
    wanted = found = 0
    if all_of_first:
        wanted = prod(geometry[0])
    for whole in boxes(geometry, shapes[0], shapes[1]):
        for i, part_a in _parts(first):
            for box in clip(whole, False, part_a.axes) if part_a else (whole,):
                if not all_of_first:
                    wanted += elements(box)
                for k, part_b in _parts(second):
                    for piece in clip(box, True, part_b.axes) if part_b else (box,):
                        found += elements(piece)
                        pieces.append(_Piece(i, k, _geometry(piece, part_a, part_b)))
    return pieces, wanted == found


def _holds(
    geometry: Geometry,
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...]],
    dst: Axes | None,
    src: Axes | None,
) -> bool:
    """Whether a rank that writes a part of the destination, None for all of it, holds what it reads."""
    for whole in boxes(geometry, *shapes):
        for box in (whole,) if dst is None else clip(whole, False, dst):
            read = clip(box, True, src) if src is not None else ()
            if elements(box) != sum(map(elements, read)):
                return False
    return True


def _parts(tensor: Any) -> list[tuple[int, SpreadPart | None]]:
    """The parts that are held here; a tensor that is not in parts has none to cut by."""
    if not isinstance(tensor, Spread):
        return [(0, None)]
    return [(k, part) for k, part in enumerate(tensor.parts) if part.held is not None]


def _first_held(tensor: Any) -> int:
    """The number of a part that is held here, -1 for none."""
    return next((k for k, _ in _parts(tensor)), -1)


def _geometry(box: Box, first: SpreadPart | None, second: SpreadPart | None) -> Geometry:
    a = placed(box.first, first.held.stride() if first else (1,))
    b = placed(box.second, second.held.stride() if second else (1,))
    return (box.sizes, *a, *b)


def _nothing(spread: Spread) -> Any:
    """An empty local tensor, for a rank that holds no part: that of the DTensor, if it has one."""
    if spread.wrapper is not None and not spread.wrapper._local_tensor.numel():
        return spread.wrapper._local_tensor
    return torch.empty(0, dtype=spread.dtype, device=spread.device)
