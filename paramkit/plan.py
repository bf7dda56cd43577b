"""Plans: every write of a job worked out and checked once, performed again and again.

A front-end (`plan`, `transplant`, `writes`) makes a `Resolved`: named destinations and sources, and
the writes between views of them. A `Plan` proves that the writes do not meet, hands them to the active
backend, which keeps them as ready tasks, and remembers what has to be true for them to run again.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from . import backend
from .conflicts import find_conflicts
from .errors import Finding, PlanError
from .judge import (
    Slot,
    conflict_finding,
    conversion_findings,
    differences,
    slots_of,
    summary_of,
    verify_in_order,
)
from .lists import as_sources, resolve_lists
from .report import Report, Summary
from .resolve import Resolved, resolve
from .rules import Rule
from .sources import open_source

__all__ = ["Plan", "plan"]

Progress = Callable[[int, int], object]


def plan(
    model: nn.Module | Mapping[str, Tensor] | Sequence[Tensor],
    source: Any,
    rules: Iterable[Rule] = (),
    *,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> Plan:
    """Work out and check every write of a transplant, or of a list of copies; write nothing yet.

    Args:
        model: what is written: a module (its parameters and persistent buffers), a mapping from names
            to tensors, or a list of n tensors of any shape, dtype and strides.
        source: for a module or mapping: a module, a mapping, or the path of a `.safetensors` file. For
            a list: a list of n tensors (each broadcasts to its destination) or numbers, or one number.
        rules: how source names and axes map to destinations; not for lists.
        identity: names that no rule touches map to themselves.
        allow_missing: destination names that may stay unwritten: exact, with `{i}`, or with `*`.
        allow_unexpected: source names that may stay unread: the same.

    Returns:
        A `Plan`; its `apply()` writes.

    Raises:
        PlanError: with everything that is wrong, at once.
        SourceError: the source cannot be read.
        TypeError: an argument of the wrong type.

    >>> import torch, paramkit
    >>> a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> plan = paramkit.plan(a, b)
    >>> report = plan.apply()
    >>> torch.equal(a.weight, b.weight)
    True
    >>> weights = [torch.zeros(2), torch.zeros(3)]
    >>> _ = paramkit.plan([w[:1] for w in weights], 0.5).apply()
    >>> weights
    [tensor([0.5000, 0.0000]), tensor([0.5000, 0.0000, 0.0000])]
    """
    if isinstance(model, (list, tuple)):
        if rules or not identity or allow_missing or allow_unexpected:
            raise TypeError(
                "plan: rules, identity, allow_missing and allow_unexpected are for a model or a mapping "
                "with names; two lists are matched by position"
            )
        return _ListPlan(model, source)
    options = {
        "rules": _kept(rules),
        "identity": identity,
        "allow_missing": _kept(allow_missing),
        "allow_unexpected": _kept(allow_unexpected),
    }
    return _ModelPlan(model, source, options)


def _kept(argument: Any) -> Any:
    """An iterable as a tuple, to be read again; what is no list of things is left for resolve() to refuse."""
    return argument if isinstance(argument, (str, Rule)) else tuple(argument)


class Plan:
    """Checked writes, ready to run. Made by `paramkit.plan`, `paramkit.writes`.

    A plan holds its destinations and sources strongly until `release()`. It acts under an implicit
    `no_grad`, except one made of two lists, which treats autograd as `Tensor.copy_` does.

    It refuses to run when what it was made for is no longer there: a parameter of the model that was
    replaced, or whose memory moved or changed its shape. `refresh()` resolves the names again.
    """

    _follow_autograd = False

    def __init__(self) -> None:
        self._compiled: Any = None
        self._summary = Summary()
        self._slots: list[Slot] = []
        self._slot_names: list[str] = []
        self._dst_names: list[str] = []
        self._src_names: list[str] = []
        self._write_dst: list[str] = []
        self._inference: list[str] = []
        self._busy = threading.Lock()
        self._ordered = False
        self._in_module = False
        self._table: Mapping[str, Any] | None = None  # destinations of a mapping that is no dict

    # --- for subclasses ---

    def _build(self, source: Any) -> None:
        """Resolve the names (again), with a source (None: the one in use), and compile."""
        raise NotImplementedError

    def _explainable(self) -> Resolved:
        raise NotImplementedError

    def _rebind(self, source: Any) -> None:
        """Take a new source of the same names, shapes and dtypes."""
        raise NotImplementedError

    # --- compiling ---

    def _compile(
        self, resolved: Resolved, *, overlap: str = "error", table: Mapping[str, Any] | None = None
    ) -> None:
        """Check the writes against each other and hand them to the backend.

        `table`: the mapping that the destinations are values of, where there is no module.
        """
        findings = conversion_findings(resolved)
        conflicts = find_conflicts(resolved)
        ordered = overlap == "last" and any(c.kind == "write" for c in conflicts)
        for c in conflicts:
            if c.kind == "write" and overlap == "last" and c.first != c.second:
                continue
            findings.append(conflict_finding(resolved, c.kind, c.first, c.second))
        if findings:
            n = len(findings)
            raise PlanError(
                f"the plan has {n} {'problem' if n == 1 else 'problems'}; nothing was written.",
                findings,
            )
        used = sorted({w.dst for w in resolved.writes})
        number = {d: k for k, d in enumerate(used)}
        destinations = [resolved.destinations[d] for d in used]
        slots, slot_names = slots_of(destinations, table if isinstance(table, dict) else None)
        writes = [
            (
                number[w.dst],
                w.src,
                w.sizes,
                w.dst_strides,
                w.dst_offset,
                w.src_strides,
                w.src_offset,
            )
            for w in resolved.writes
        ]
        active = backend.active()
        compiled = active.Plan(
            [d.tensor for d in destinations],
            list(resolved.source_tensors),
            writes,
            slots,
            self._follow_autograd,
            ordered,
        )
        self._compiled, self._slots, self._slot_names = compiled, slots, slot_names
        self._table = None if isinstance(table, dict) else table
        self._ordered = ordered
        self._in_module = any(d.owner is not None for d in destinations)
        self._inference = [d.name for d in destinations if d.tensor.is_inference()]
        self._dst_names = [d.name for d in destinations]
        self._src_names = list(resolved.source_names)
        self._write_dst = [resolved.destinations[w.dst].name for w in resolved.writes]
        self._summary = summary_of(resolved, self._dst_names, compiled.families(), active.NAME)

    # --- public ---

    def apply(self, source: Any = None, *, progress: Progress | None = None) -> Report:
        """Write.

        Args:
            source: a new source of the same names, shapes and dtypes, used from now on (the plan holds
                it instead of the old one); a changed memory layout is planned anew. None: the source
                in use.
            progress: called now and then with (bytes written, bytes in all).

        Returns:
            What was written, and how fast.

        Raises:
            PlanError: a destination or source is not what the plan was made for, or `source` differs
                in a name, shape or dtype. Nothing was written.
            RuntimeError: a plan of lists, where `Tensor.copy_` would raise (a leaf that requires grad).
        """
        if progress is not None and not callable(progress):
            raise TypeError(f"apply: progress must be callable, got {type(progress).__name__}")
        self._enter()
        try:
            return self._apply(source, progress)
        finally:
            self._busy.release()

    def _apply(self, source: Any, progress: Progress | None) -> Report:
        compiled = self._take(source)
        if self._inference and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"apply: {', '.join(self._inference)}: Inplace update to inference tensor outside InferenceMode "
                "is not allowed; nothing was written: write inside torch.inference_mode()"
            )
        start = perf_counter()
        if self._replaced_in_table() or not compiled.run(progress):
            raise self._stale()
        return Report(self._summary, perf_counter() - start)

    def _take(self, source: Any) -> Any:
        """The compiled plan, with a new source if there is one."""
        compiled = self._ready()
        self._check_alive()
        if source is None:
            return compiled
        # Judged before the source is taken: a refused call changes nothing.
        if compiled.moved()[0] or compiled.replaced() or self._replaced_in_table():
            raise self._stale()
        self._rebind(source)
        return self._compiled

    def explain(self) -> str:
        """The plan as a table, layers of one kind folded into one row."""
        from .explain import explain

        families = self._ready().families()
        return explain(self._explainable(), dict(enumerate(families)))

    def verify(self, source: Any = None) -> list[str]:
        """The names of destinations whose bits are not what `apply()` writes; empty when all are.

        After a cast, any NaN counts as equal to any NaN.

        Args:
            source: as for `apply`.

        Raises:
            PlanError: as `apply`.
        """
        self._enter()
        try:
            compiled = self._take(source)
            if self._is_stale():
                raise self._stale()
            differ = verify_in_order(compiled) if self._ordered else compiled.verify()
        finally:
            self._busy.release()
        return list(dict.fromkeys(self._write_dst[i] for i in differ))

    def refresh(self, source: Any = None) -> None:
        """Resolve the names again: after a parameter was replaced, moved or resized, or `release()`.

        Args:
            source: a new source; None keeps the one in use. Needed after `release()`.

        Raises:
            PlanError: what the names stand for now does not fit. The plan stays as it was.
        """
        self._enter()
        try:
            self._build(source)
        finally:
            self._busy.release()

    def release(self) -> None:
        """Let go of every tensor. `refresh(source)` makes a plan with names usable again."""
        self._compiled = None
        self._slots, self._slot_names = [], []

    def set_requires_grad(self, requires_grad: bool) -> None:
        """Set `requires_grad` on every floating-point or complex parameter that this plan writes.

        Buffers of a module stay as they are; of a mapping or a list every tensor counts.

        >>> import torch, paramkit
        >>> model = torch.nn.Linear(2, 2)
        >>> plan = paramkit.plan(model, torch.nn.Linear(2, 2))
        >>> plan.set_requires_grad(False)
        >>> model.weight.requires_grad
        False
        """
        for tensor in self._trainable(requires_grad):
            tensor.requires_grad_(requires_grad)

    def _trainable(self, requires_grad: bool) -> list[Tensor]:
        """What `set_requires_grad` sets; raises where it cannot be."""
        if not isinstance(requires_grad, bool):
            raise TypeError(f"requires_grad must be True or False, got {requires_grad!r}")
        named = zip(self._dst_names, self._ready().destinations(), strict=True)
        chosen = {
            name: tensor
            for name, tensor in named
            if (isinstance(tensor, nn.Parameter) or not self._in_module)
            and (tensor.is_floating_point() or tensor.is_complex())
        }
        inner = [
            Finding(n, "requires_grad", "not a leaf", "a leaf")
            for n, t in chosen.items()
            if not t.is_leaf
        ]
        if inner and not requires_grad:
            raise PlanError("requires_grad can only be set on leaves; nothing was written.", inner)
        return list(chosen.values())

    def _check_alive(self) -> None:
        """Raise if the model that this plan writes to is gone."""

    def _enter(self) -> None:
        """One call at a time: the GIL is given up while a long plan runs."""
        if not self._busy.acquire(blocking=False):
            raise PlanError(
                "this plan is in use already, by another thread or the call that it is in; "
                "nothing was written."
            )

    def _ready(self) -> Any:
        if self._compiled is None:
            raise PlanError("this plan was released; refresh(source) resolves its names again.")
        return self._compiled

    def _is_stale(self) -> bool:
        return any(self._compiled.moved()) or bool(
            self._compiled.replaced() or self._replaced_in_table()
        )

    def _replaced_in_table(self) -> list[str]:
        """Names of a mapping that is no dict whose value is another one now; dicts the backend watches."""
        if self._table is None:
            return []
        held = zip(self._dst_names, self._compiled.destinations(), strict=True)
        return [name for name, tensor in held if self._table.get(name) is not tensor]

    def _stale(self) -> PlanError:
        dsts, srcs = self._compiled.moved()
        names = [self._slot_names[i] for i in self._compiled.replaced()] + self._replaced_in_table()
        findings = [
            Finding(
                name,
                "replaced",
                "another object in the model",
                "the one planned for",
                "plan.refresh()",
            )
            for name in dict.fromkeys(names)
        ]
        findings += [
            Finding(
                self._dst_names[i],
                "moved",
                "other memory, another layout, or no owner but this plan",
                "the tensor as it was planned for",
                "plan.refresh()",
            )
            for i in dsts
        ]
        findings += [
            Finding(
                self._src_names[i],
                "moved",
                "a source with other memory or layout",
                "",
                "plan.refresh()",
            )
            for i in srcs
        ]
        return PlanError("the plan no longer fits; nothing was written.", findings)

    def __repr__(self) -> str:
        if self._compiled is None:
            return f"<{type(self).__name__.lstrip('_')}, released>"
        s = self._summary
        return f"<paramkit.Plan: {s.writes} writes into {len(s.names)} tensors, {s.bytes} bytes, backend {s.backend}>"


class _ModelPlan(Plan):
    """A model (or mapping) from a source, by rules."""

    def __init__(
        self, model: nn.Module | Mapping[str, Tensor], source: Any, options: dict[str, Any]
    ) -> None:
        super().__init__()
        # Weakly: a plan keeps tensors alive, never a whole model. Mappings cannot be held weakly.
        self._model: Callable[[], Any] = (
            weakref.ref(model) if isinstance(model, nn.Module) else lambda: model
        )
        self._options = options
        self._source: Mapping[str, Tensor] | None = None
        self._resolved = Resolved()
        self._build(open_source(source))

    def _check_alive(self) -> None:
        if self._model() is None:
            raise PlanError("the model of this plan no longer exists; nothing was written.")

    def _build(self, source: Any) -> None:
        self._check_alive()
        model = self._model()
        if source is None and self._source is None:
            raise PlanError("this plan was released, its source with it; give refresh() a source.")
        tensors = open_source(self._source if source is None else source)
        resolved = resolve(model, tensors, **self._options)
        self._compile(resolved, table=None if isinstance(model, nn.Module) else model)
        for d in resolved.destinations:  # the plan holds tensors, not the modules that own them
            d.owner, d.path, d.alias_places = None, (), ()
        resolved.source_tensors = []
        self._source, self._resolved = tensors, resolved

    def _explainable(self) -> Resolved:
        return replace(self._resolved, source_tensors=self._compiled.sources())

    def _rebind(self, source: Any) -> None:
        plain = type(source) in (dict, OrderedDict)
        tensors = dict(source) if plain else open_source(source)
        assert self._source is not None
        if tensors.keys() == self._source.keys() and not self._compiled.rebind(
            tensors, self._src_names
        ):
            self._source = tensors
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
        self._build(tensors)  # only strides or devices differ: the same writes from other views

    def release(self) -> None:
        super().release()
        self._source, self._resolved = None, Resolved()


class _ListPlan(Plan):
    """Destinations and sources matched by position: the replay of foreach_copy_ and foreach_fill_.

    It keeps no Python reference to its destinations, so that the backend can tell when nobody else has.
    """

    _follow_autograd = True

    def __init__(self, dsts: Sequence[Tensor], srcs: Any) -> None:
        super().__init__()
        self._compile(resolve_lists(dsts, srcs))

    def _build(self, source: Any) -> None:
        compiled = self._compiled
        if compiled is None:
            raise PlanError(
                "this plan of two lists was released, and they have no names: make a new plan."
            )
        self._compile(
            resolve_lists(compiled.destinations(), compiled.sources() if source is None else source)
        )

    def _explainable(self) -> Resolved:
        compiled = self._ready()
        return resolve_lists(compiled.destinations(), compiled.sources())

    def _rebind(self, source: Any) -> None:
        dsts = self._ready().destinations()
        tensors = as_sources(dsts, source)
        if self._compiled.rebind(dict(zip(self._src_names, tensors)), self._src_names):
            was = dict(zip(self._src_names, self._compiled.sources(), strict=True))
            findings = differences(was, dict(zip(self._src_names, tensors, strict=True)))
            if findings:
                raise PlanError(
                    "the new sources differ from those planned for; nothing was written.", findings
                )
            if self._is_stale():
                raise self._stale()
            self._compile(resolve_lists(dsts, tensors))
