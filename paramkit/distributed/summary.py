"""What a transfer does on one rank, for people."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from .. import backend
from ..errors import dtype_text
from ..report import Cast, Summary

if TYPE_CHECKING:
    from .work import Work

__all__ = ["explained", "summary_of_work"]


def summary_of_work(work: Work) -> Summary:
    """What this rank writes, held here or received."""
    resolved, rank = work.resolved, work.talk.rank
    received = [p for s in work.routes.streams if rank in s.receivers for p in s.pieces]
    n = written = read = 0
    names: dict[str, None] = {}
    casts: dict[tuple[str, str], Cast] = {}
    for i, box in (*work.routes.here, *received):
        w, count = resolved.writes[i], prod(box.sizes)
        src, dst = resolved.source_tensors[w.src].dtype, work.dst_dtypes[i]
        n += count
        written += count * dst.itemsize
        read += count * work.wire[i].itemsize
        names[work.names[i]] = None
        if src != dst:
            source = resolved.source_names[w.src]
            cast = Cast(work.names[i], source, dtype_text(src), dtype_text(dst))
            casts[work.names[i], source] = cast
    first = len(resolved.source_tensors) - resolved.made
    if rank in work.common.dst.ranks:
        for k, w in enumerate(resolved.writes):
            if w.src >= first and work.own.dst[k] is not None and work.own.dst[k].numel():
                names[work.names[k]] = None
    return Summary(
        tuple(names),
        len(work.routes.here) + len(received),
        n,
        written,
        written + read,
        tuple(casts.values()),
        (*resolved.kept, *(f"{name} (in part)" for name in resolved.partial)),
        tuple(resolved.dropped),
        {"held here": len(work.routes.here), "received": len(received)},
        backend.active().NAME,
    )


def explained(work: Work) -> str:
    """A rank's part of a transfer, in a few lines."""
    s, talk = work.summary, work.talk
    lines = [
        f"rank {talk.rank} of {talk.size}: {len(s.names)} tensors, {s.bytes:,} bytes written; "
        f"{s.routes.get('held here', 0)} pieces held here, {s.routes.get('received', 0)} received"
    ]
    for traffic in work.passes[:1]:
        for number, stream in enumerate(traffic.streams):
            sizes = [
                m.bytes
                for r in traffic.rounds
                for n, _, m in (*r.sends, *r.receives)
                if n == number
            ]
            to = ", ".join(map(str, stream.receivers))
            lines.append(
                f"rank {stream.sender} -> {to}: {len(stream.pieces)} pieces, "
                f"{sum(sizes):,} bytes in {len(sizes)} messages"
            )
        lines.append(f"staging: {traffic.staging:,} bytes")
    return "\n".join(lines)
