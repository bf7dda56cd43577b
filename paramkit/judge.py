"""What a plan asks of its writes before it is made, and of its tensors before it runs again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from .backend import checks, native
from .destinations import Destination, Place
from .errors import Finding, dtype_text
from .report import Cast, Summary
from .resolve import Resolved
from .sources.lazy import Lazy

__all__ = [
    "Slot",
    "conflict_finding",
    "conversion_findings",
    "differences",
    "slots_of",
    "summary_of",
    "verify_in_order",
]

# (table, key, value): what leads from a model to a destination; `table[key] is value` must hold.
Slot = tuple[dict[str, Any], str, object]


def differences(was: Mapping[str, Tensor], now: Mapping[str, Any]) -> list[Finding]:
    """Where a new source is not like the one that was planned for, in names, shapes and dtypes."""
    findings = [
        Finding(n, "missing", "", "a tensor in the new source") for n in was if n not in now
    ]
    findings += [
        Finding(str(n), "unexpected", "", "only the names planned for") for n in now if n not in was
    ]
    for name, old in was.items():
        new = now.get(name)
        if new is None:
            continue
        if not isinstance(new, (Tensor, Lazy)):
            findings.append(Finding(name, "type", type(new).__name__, "a tensor"))
        elif new.shape != old.shape:
            findings.append(Finding(name, "shape", str(tuple(new.shape)), str(tuple(old.shape))))
        elif new.dtype != old.dtype:
            findings.append(Finding(name, "dtype", str(new.dtype), str(old.dtype)))
    return findings


def verify_in_order(compiled: Any) -> list[int]:
    """Of writes that may meet, the later one wins: they are done in order on copies of the destinations."""
    dsts, copies = compiled.destinations(), []
    for dst in dsts:
        span = (
            1 + sum((n - 1) * st for n, st in zip(dst.shape, dst.stride(), strict=True))
            if dst.numel()
            else 0
        )
        memory = dst.detach().as_strided((span,), (1,)).clone()
        copies.append(memory.as_strided(dst.shape, dst.stride()))
    replay = native.Plan(copies, compiled.sources(), compiled.writes(), [], False, True)
    replay.run()
    return [
        i
        for i, write in enumerate(compiled.writes())
        if not native.same_bits(dsts[write[0]].detach(), copies[write[0]])
    ]


def conversion_findings(resolved: Resolved) -> list[Finding]:
    findings = []
    for w in resolved.writes:
        dst, src = resolved.destinations[w.dst], resolved.source_tensors[w.src]
        error = checks.conversion_error(dst.tensor.dtype, src.dtype)
        if error is not None:
            name = resolved.source_names[w.src]
            findings.append(
                Finding(
                    dst.name,
                    "dtype",
                    f"{src.dtype} from {name}",
                    f"what torch can copy to {dst.tensor.dtype}: {error}",
                )
            )
    return findings


def conflict_finding(resolved: Resolved, kind: str, first: int, second: int) -> Finding:
    def said(i: int) -> str:
        w = resolved.writes[i]
        text = f" ({w.text})" if w.text else ""
        return f"{resolved.destinations[w.dst].name} <- {resolved.source_names[w.src]}{text}"

    name = resolved.destinations[resolved.writes[second].dst].name
    hint = 'drop one of them; for recorded writes, overlap="last" lets the later one win'
    if kind == "read":
        return Finding(
            name,
            "conflict",
            f"{said(second)} reads memory that {said(first)} writes",
            "sources apart from destinations",
            "clone() the source",
        )
    if first == second:
        return Finding(
            name,
            "conflict",
            f"{said(first)}: a destination that overlaps itself",
            "one place for each element",
        )
    return Finding(
        name,
        "conflict",
        f"both {said(first)} and {said(second)} write one element",
        "each element written once",
        hint,
    )


def slots_of(
    destinations: Sequence[Destination], table: dict[str, Any] | None
) -> tuple[list[Slot], list[str]]:
    """Every dict entry that leads from the model to a destination: what a replaced Parameter changes."""
    slots: dict[tuple[int, str], Slot] = {}
    names: dict[tuple[int, str], str] = {}

    def add(table: dict[str, Any], key: str, value: object, name: str) -> None:
        slots.setdefault((id(table), key), (table, key, value))
        names.setdefault((id(table), key), name)

    for d in destinations:
        if table is not None:
            for name in (d.name, *d.aliases):
                add(table, name, table[name], name)
        places = [Place(d.owner, d.key, d.path)] if d.owner is not None else []
        for name, place in zip((d.name, *d.aliases), (*places, *d.alias_places)):
            for parent, key, child in place.path:
                add(parent._modules, key, child, name)
            held = (
                place.owner._parameters
                if place.key in place.owner._parameters
                else place.owner._buffers
            )
            add(held, place.key, held[place.key], name)
    return list(slots.values()), list(names.values())


def summary_of(
    resolved: Resolved, names: Sequence[str], families: Sequence[str], backend_name: str
) -> Summary:
    elements = written = moved = 0
    casts = []
    for w in resolved.writes:
        dst, src = resolved.destinations[w.dst].tensor, resolved.source_tensors[w.src]
        n = prod(w.sizes)
        read = prod(k for k, stride in zip(w.sizes, w.src_strides, strict=True) if stride)
        elements += n
        written += n * dst.element_size()
        moved += n * dst.element_size() + (read if n else 0) * src.element_size()
        if dst.dtype != src.dtype:
            src_dtype, dst_dtype = dtype_text(src.dtype), dtype_text(dst.dtype)
            casts.append(
                Cast(
                    resolved.destinations[w.dst].name,
                    resolved.source_names[w.src],
                    src_dtype,
                    dst_dtype,
                )
            )
    routes: dict[str, int] = {}
    for family in families:
        routes[family] = routes.get(family, 0) + 1
    return Summary(
        tuple(names),
        len(resolved.writes),
        elements,
        written,
        moved,
        tuple(casts),
        (*resolved.kept, *(f"{name} (in part)" for name in resolved.partial)),
        tuple(resolved.dropped),
        routes,
        backend_name,
    )
