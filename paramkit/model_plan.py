"""Plans of a model, or a mapping, from a source with names, by rules."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .before import overflow_findings, tie_findings
from .destinations import Destination, Place, allocated, memory_key
from .errors import Finding, PlanError
from .judge import (
    differences,
)
from .localize import localize
from .options import Options
from .plan import Plan
from .resolve import Resolved, plan_error, resolve
from .sharding import any_sharded, is_sharded, unsharded_finding
from .sources import open_source
from .sources.lazy import Lazy

__all__ = ["ModelPlan"]


class ModelPlan(Plan):
    """A model (or mapping) from a source, by rules."""

    _follow_failures = True

    def __init__(
        self, model: nn.Module | Mapping[str, Tensor], source: Any, options: Options
    ) -> None:
        super().__init__()
        # Weakly: a plan keeps tensors alive, never a whole model. Mappings cannot be held weakly.
        self._model: Callable[[], Any] = (
            weakref.ref(model) if isinstance(model, nn.Module) else lambda: model
        )
        self._options = options
        self._source: Mapping[str, Any] | None = None
        self._in_memory = True
        self._in_parts = False
        self._unread: list[str] = []  # names of the source
        self._resolved = Resolved()
        self._whole: Resolved | None = None  # before it was cut to what this rank holds
        self._build_from(*self._open(source))

    def _check_alive(self) -> None:
        if isinstance(self._model, weakref.ref) and self._model() is None:
            raise PlanError("the model of this plan no longer exists; nothing was written.")

    def _target(self) -> Any:
        return self._model()

    @property
    def _exchangeable(self) -> bool:
        return self._in_memory

    def _open(self, source: Any) -> tuple[dict[str, Any], bool]:
        """The source's tensors, and whether they are the user's own memory."""
        own = isinstance(source, (nn.Module, Mapping))
        return open_source(source, mmap=self._options.mmap), own

    def _build(self, source: Any) -> None:
        if source is not None:
            self._build_from(*self._open(source))
        elif self._source is None:
            raise PlanError("this plan was released, its source with it; give refresh() a source.")
        else:
            self._build_from(self._source, self._in_memory)

    def _build_from(self, tensors: Mapping[str, Any], own: bool) -> None:
        self._check_alive()
        model = self._model()
        gathered = unsharded_finding(model)
        if gathered is not None:
            raise plan_error([gathered])
        whole = resolve(model, tensors, **self._options.resolving())
        resolved = localize(whole)
        made = self._allocate(resolved)
        self._compile(
            resolved,
            table=None if isinstance(model, nn.Module) else model,
            staging=self._options.staging,
        )
        # Kept for installing what was allocated; otherwise a plan holds tensors, not their modules.
        self._allocated = [replace(d) for d in made]
        for d in (*whole.destinations, *resolved.destinations):
            d.owner, d.path, d.alias_places = None, (), ()
        self._whole = None
        if self._options.overflow == "error" and resolved is not whole:
            self._whole = replace(whole, source_tensors=[])
        resolved.source_tensors = []
        self._source, self._in_memory, self._resolved = tensors, own, resolved
        self._in_parts = any_sharded(tensors.values())
        read = set(self._src_names)
        self._unread = [name for name in tensors if name not in read]

    def _allocate(self, resolved: Resolved) -> list[Destination]:
        """Memory for the destinations on the meta device, once each, not initialised."""
        device = self._options.device
        chosen = [resolved.destinations[k] for k in sorted({w.dst for w in resolved.writes})]
        if device is None:
            return []
        chosen = [d for d in chosen if d.tensor.is_meta]
        for d in chosen:
            d.tensor = allocated(d.tensor, device)
        return chosen

    def _install(self) -> None:
        """Put what was allocated into the model, under every name, in place of the meta tensors."""
        for d in self._allocated:
            if d.owner is None:  # of a mapping
                for name in (d.name, *d.aliases):
                    self._model()[name] = d.tensor
                continue
            for place in (Place(d.owner, d.key, d.path), *d.alias_places):
                parameters = place.owner._parameters
                table: Any = parameters if place.key in parameters else place.owner._buffers
                table[place.key] = d.tensor
        self._allocated = []

    def _asks_values(self, resolved: Resolved) -> bool:
        return bool(resolved.ties) or self._options.overflow != "ignore"

    def _check_values(self, compiled: Any) -> None:
        resolved, limit = self._resolved, self._options.staging // 2
        if not self._asks_values(resolved):
            return
        if self._is_stale():
            raise self._stale()
        sources = compiled.sources()
        findings = tie_findings(resolved, sources, limit)
        if self._options.overflow == "error":
            findings += self._overflows(sources, limit)
        if findings:
            raise plan_error(findings)

    def _overflows(self, sources: Sequence[Any], limit: int) -> list[Finding]:
        """What the destinations cannot hold. Of whole sources all of it, so that all ranks say the same."""
        resolved, whole, source = self._resolved, self._whole, self._source
        if whole is None or source is None:
            return overflow_findings(resolved, resolved.writes, sources, limit)
        # Of a DTensor, each rank sees its own part alone.
        in_parts = {name for name, tensor in source.items() if is_sharded(tensor)}
        own = [w for w in resolved.writes if resolved.source_names[w.src] in in_parts]
        findings = overflow_findings(resolved, own, sources, limit)
        names = whole.source_names[: len(whole.source_names) - whole.made]
        rest = [
            w
            for w in whole.writes
            if w.src < len(names) and whole.source_names[w.src] not in in_parts
        ]
        tensors = [source[name] for name in names]
        return [*findings, *overflow_findings(whole, rest, tensors, limit)]

    def _explainable(self) -> Resolved:
        return replace(self._resolved, source_tensors=self._compiled.sources())

    def _rebind(self, source: Any) -> None:
        plain = type(source) in (dict, OrderedDict)
        tensors, own = (dict(source), True) if plain else self._open(source)
        assert self._source is not None
        # Of tensors in parts, what is held where may have changed.
        in_parts = self._in_parts or any_sharded(tensors.values())
        if not in_parts and tensors.keys() == self._source.keys() and self._unread_alike(tensors):
            read, names = tensors, self._src_names
            if self._resolved.made:
                # A number that a rule fills with is bound again as it is, under a name that no tensor has.
                first = len(names) - self._resolved.made
                made = {f"\0{k}": t for k, t in enumerate(self._compiled.sources()[first:])}
                read, names = {**tensors, **made}, [*names[:first], *made]
            if not self._compiled.rebind(read, names):
                self._source, self._in_memory = tensors, own
                return
        findings = differences(self._source, tensors)
        if findings:
            raise PlanError(
                "the new source differs from the one that was planned for; nothing was written. "
                "Make a new plan, or call refresh(source).",
                findings,
            )
        if self._is_stale():
            raise self._stale()
        # A file, other strides or devices, other ties: writes from other views, or other writes.
        self._build_from(tensors, own)

    def _unread_alike(self, tensors: Mapping[str, Any]) -> bool:
        """Whether names that are not read are still what they were: of the same kind, tied to the same."""
        also = self._resolved.also
        for name in self._unread:
            new = tensors[name]
            if name in also and memory_key(new) != memory_key(tensors[also[name]]):
                return False
            assert self._source is not None
            old = self._source[name]
            if not isinstance(new, (Tensor, Lazy)) or (new.shape, new.dtype) != (
                old.shape,
                old.dtype,
            ):
                return False
        return True

    def _undo(self, source: Any) -> Callable[[], object]:
        before, own = self._source, self._in_memory
        if source is None or before is None:
            return lambda: None
        return lambda: self._build_from(before, own)

    def release(self) -> None:
        super().release()
        self._source, self._resolved, self._whole = None, Resolved(), None
