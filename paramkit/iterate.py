"""Sources that come one tensor at a time: each is written before the next one is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from . import backend
from .backend.native import same_bits
from .before import tie_finding
from .casting import may_overflow, overflow_finding, overflows
from .conflicts import find_conflicts
from .destinations import Destination, is_uninitialized, layout_finding
from .errors import Finding, PlanError, SourceError
from .fills import Constant, Mean
from .interrupts import settled, without_grad
from .journal import Journal
from .judge import conflict_finding, summary_of
from .localize import local_tensor, local_writes
from .ops import foreach_copy_
from .options import Options
from .pieces import read_view, view_of
from .report import Report
from .resolve import Resolved, Resolver, Write, plan_error
from .sharding import unsharded_finding
from .sources.lazy import Lazy, Stored
from .sources.spread import Spread
from .torn import Torn, TornError, clear, mark, reason_of, torn_error

__all__ = ["is_stream", "transplant_stream"]

Progress = Callable[[int, int], object]


def is_stream(source: object) -> bool:
    """Whether a source is an iterable of (name, tensor), rather than something that can be looked into.

    >>> is_stream(iter({"a": 1}.items())), is_stream({"a": 1}), is_stream(["a.safetensors"])
    (True, False, False)
    """
    return (
        isinstance(source, Iterable)
        and not isinstance(source, (nn.Module, Mapping, str, bytes, list, tuple, Tensor))
        and not hasattr(source, "__fspath__")
    )


def transplant_stream(
    model: nn.Module | Mapping[str, Tensor],
    items: Iterable[tuple[str, Tensor]],
    options: Options,
    *,
    atomic: bool = False,
    requires_grad: bool | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the tensors of an iterable; see `paramkit.transplant`.

    No tensor is held after it was written.
    """
    if options.device is not None:
        raise ValueError(
            "transplant: device is for sources whose names are known beforehand; give the model memory with "
            "to_empty(device=...) to fill it from an iterable"
        )
    return _Stream(model, options, atomic, requires_grad, progress).run(items)


class _Stream:
    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        options: Options,
        atomic: bool,
        requires_grad: bool | None,
        progress: Progress | None,
    ) -> None:
        if progress is not None and not callable(progress):
            raise TypeError(f"transplant: progress must be callable, got {type(progress).__name__}")
        self.model, self.options, self.progress = model, options, progress
        resolving = options.resolving()
        self.resolver = Resolver(model, **resolving, streaming=True)
        self.requires_grad = requires_grad
        if requires_grad is not None and not isinstance(requires_grad, bool):
            raise TypeError(f"requires_grad must be True or False, got {requires_grad!r}")
        self.journal = Journal() if atomic else None
        self.written: set[int] = set()  # destinations
        self.names: set[str] = set()  # of the source, so far
        self.routes: Counter[str] = Counter()  # which kernels wrote
        self.bytes = 0
        self.done = self.tied = 0  # how many of the resolver's writes and ties are dealt with
        self.sure = 0  # how many of them are written for certain
        gathered = unsharded_finding(model)
        if gathered is not None:
            raise plan_error([gathered])
        # What this process holds of each destination.
        self.local = [local_tensor(d.tensor) for d in self.resolver.destinations]
        self.storages = {
            t.untyped_storage().data_ptr()
            for t in self.local
            if t is not None
            and t.layout is torch.strided
            and not (t.is_meta or is_uninitialized(t))
        }

    def run(self, items: Iterable[tuple[str, Tensor]]) -> Report:
        start = perf_counter()
        active = backend.active()
        # All of it is one write to other threads, however long the next tensor takes to come.
        with active.Claim([t for t in self.local if t is not None], []):
            resolved = settled(partial(self._write_all, items), self._failed)
        names = [resolved.destinations[k].name for k in sorted(self.written)]
        clear(self.model, names)
        self._set_requires_grad()
        families = list(self.routes.elements())
        summary = summary_of(resolved, names, families, active.NAME)
        return Report(summary, perf_counter() - start)

    def _write_all(self, items: Iterable[tuple[str, Tensor]]) -> Resolved:
        self._check_destinations()
        self._write()  # what rules fill without a source
        for item in items:
            self._take(item)
            del item  # or it would live on while the next one is made
        resolved = self.resolver.finish()
        self._write()  # what wildcards fill
        return resolved

    def _check_destinations(self) -> None:
        """What can be known before the first tensor comes."""
        r = self.resolver
        local = [(d, t) for d, t in zip(r.destinations, self.local, strict=True) if t is not None]
        inference = [d.name for d, t in local if not is_uninitialized(t) and t.is_inference()]
        if inference and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"transplant: {', '.join(inference)}: Inplace update to inference tensor outside InferenceMode "
                "is not allowed; nothing was written: write inside torch.inference_mode()"
            )
        inner = [
            Finding(d.name, "requires_grad", "not a leaf", "a leaf")
            for d, t in local
            if self.requires_grad is False
            and d.kind in ("parameter", "tensor")
            and not _shown(d, t).is_leaf
        ]
        if inner:
            raise PlanError("requires_grad can only be set on leaves; nothing was written.", inner)
        # Each destination over itself: what overlaps is two destinations in one memory.
        usable = [
            replace(d, tensor=t) for d, t in local if layout_finding(d.name, d.tensor, True) is None
        ]
        shapes = [tuple(d.tensor.shape) for d in usable]
        steps = [d.tensor.stride() for d in usable]
        whole = Resolved(
            usable,
            [d.name for d in usable],
            [d.tensor for d in usable],
            [Write(k, k, n, st, 0, st, 0) for k, (n, st) in enumerate(zip(shapes, steps))],
        )
        findings = [
            conflict_finding(whole, c.kind, c.first, c.second)
            for c in find_conflicts(whole)
            if c.kind == "write"
        ]
        if findings or r.findings:
            raise plan_error([*r.findings, *findings])

    # -- one tensor --

    def _take(self, item: Any) -> None:
        r = self.resolver
        name, tensor = self._checked(len(self.names), item)
        r.add(name, tensor)
        if r.findings:
            raise plan_error(r.findings)
        tensor = r.src_tensors[-1]
        self._check_values(name, tensor)
        self._write()
        # From here on its shape is all that is needed of it.
        strides = tensor.stride() if tensor.layout is torch.strided else None
        r.src_tensors[-1] = Lazy(tuple(tensor.shape), tensor.dtype, strides)
        for k, (fill, made) in enumerate(r.made):
            if isinstance(made, Mean):
                r.made[k] = (fill, Lazy(made.shape, made.dtype))

    def _checked(self, number: int, item: Any) -> tuple[str, Any]:
        if not (isinstance(item, tuple) and len(item) == 2):
            raise PlanError(
                "the source iterable cannot be used.",
                [Finding(f"item {number}", "type", type(item).__name__, "a pair (name, tensor)")],
            )
        name, tensor = item
        if not isinstance(name, str) or not isinstance(tensor, (Tensor, Lazy)):
            what = Finding(
                f"item {number}",
                "type",
                f"({type(name).__name__}, {type(tensor).__name__})",
                "a name (str) and a tensor",
            )
            raise PlanError("the source iterable cannot be used.", [what])
        if name in self.names:
            raise PlanError(
                "the source iterable cannot be used.",
                [Finding(name, "conflict", "the same name again", "each name once")],
            )
        self.names.add(name)
        if isinstance(tensor, Stored):
            tensor.file.check()
        if isinstance(tensor, Tensor):
            tensor = tensor.detach()
        return name, tensor

    def _check_values(self, name: str, tensor: Any) -> None:
        r = self.resolver
        findings: list[Finding] = []
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            if tensor.numel() and tensor.untyped_storage().data_ptr() in self.storages:
                findings.append(
                    Finding(
                        name,
                        "conflict",
                        "a tensor in the memory of a destination",
                        "sources apart from destinations",
                        "clone() the source",
                    )
                )
        if self.options.overflow == "error" and not findings:
            for write in r.writes[self.done :]:
                d = r.destinations[write.dst]
                if write.src < 0 or not may_overflow(tensor.dtype, d.tensor.dtype):
                    continue
                lost = overflows(d.tensor.dtype, _seen(r.src_tensors[-1], write))
                if lost is not None:
                    findings.append(overflow_finding(d.name, name, d.tensor.dtype, lost))
        if findings:
            raise plan_error(findings)

    def _write(self) -> None:
        r = self.resolver
        dsts, srcs = [], []
        writes = r.writes[self.done :]
        wrappers = []
        for write in writes:
            d = r.destinations[write.dst]
            if 0 in write.sizes:
                continue
            if isinstance(d.tensor, Spread):
                wrappers.append(d.tensor.wrapper)
            for to, source, w in local_writes(write, d.tensor, self._source(write), d.name):
                dsts.append(view_of(to, w.sizes, w.dst_strides, w.dst_offset))
                srcs.append(_seen(source, w))
        self.done += len(writes)
        ties = r.proof.ties[self.tied :]
        self.tied += len(ties)
        if dsts and self.journal is not None:
            self.journal.note(dsts)
        # Also where the shard of this rank is empty. What autograd saved is the DTensor.
        self.written.update(w.dst for w in writes)
        if wrappers:
            torch.autograd.graph.increment_version(wrappers)
        if dsts:
            with backend.trace() as traced:
                without_grad(partial(foreach_copy_, dsts, srcs))
            self.routes.update(traced.routes)
            self.sure = self.done
            self.bytes += sum(d.nbytes for d in dsts)
            if self.progress is not None:
                self.progress(self.bytes, 0)
        for first, other in ties:
            self._compare(first, other)

    def _compare(self, first: Write, other: Write) -> None:
        """A second source of the same elements must hold what was written from the first."""
        d = self.resolver.destinations[first.dst]
        whole = replace(other, dst_strides=first.dst_strides, dst_offset=first.dst_offset)
        for to, source, w in local_writes(whole, d.tensor, self._source(other), d.name):
            held = view_of(to, w.sizes, w.dst_strides, w.dst_offset)
            if not same_bits(held, _seen(source, w).to(held.device)):
                names = self.resolver.src_names
                text = f"from {names[first.src]} and from {names[other.src]}"
                raise plan_error([tie_finding(d, text)])

    def _source(self, write: Write) -> Any:
        r = self.resolver
        return r.src_tensors[write.src] if write.src >= 0 else r.made[-1 - write.src][1]

    # -- the end --

    def _failed(self, error: BaseException) -> TornError | None:
        if not self.written:
            return None
        r = self.resolver
        if self.journal is not None:
            self.journal.restore()
            return None
        written: dict[int, list[Write]] = {}
        for write in r.writes[: self.sure]:
            written.setdefault(write.dst, []).append(write)
        full = {k for k in self.written if r.proof.whole(k, written.get(k, ()))}
        allowed, _ = r.may_miss.select(r.dst_index)
        names, left = [], []
        for k, d in enumerate(r.destinations):
            if k in full:
                names.append(d.name)
            elif k in self.written or not (
                d.transient or k in r.proof.kept or self._may_stay(d, allowed)
            ):
                left.append(d.name)
        if not left and not isinstance(error, Exception):
            return None  # interrupted when all was done
        plan = isinstance(error, PlanError) and not isinstance(error, SourceError)
        reason = "what is wrong shows only now that writing has begun" if plan else reason_of(error)
        state = Torn(tuple(names), tuple(left), reason)
        mark(self.model, state)
        if not isinstance(error, Exception):
            return None
        return torn_error(state, getattr(error, "findings", ()))

    def _may_stay(self, d: Destination, allowed: Mapping[str, int]) -> bool:
        """Whether a destination may stay as it is: by an allow-list, or by a wildcard that keeps it."""
        keeps = [t for k, t in self.resolver.crossing_dst if self.resolver.rules[k].fill is None]
        return any(
            name in allowed or any(t.match(name) for t in keeps) for name in (d.name, *d.aliases)
        )

    def _set_requires_grad(self) -> None:
        if self.requires_grad is None:
            return
        for k in self.written:
            d = self.resolver.destinations[k]
            if d.kind in ("parameter", "tensor") and (
                d.tensor.dtype.is_floating_point or d.tensor.dtype.is_complex
            ):
                _shown(d, d.tensor).requires_grad_(self.requires_grad)


def _shown(d: Destination, tensor: Any) -> Any:
    """What the user sees of a destination: of a local tensor its DTensor."""
    return d.tensor.wrapper if isinstance(d.tensor, Spread) else tensor


def _seen(source: Any, write: Write) -> Tensor:
    """What a write reads."""
    if isinstance(source, Constant):
        return source.beside().expand(write.sizes)
    return read_view(source, write)
