"""Plans: every write of a job worked out and checked once, performed again and again.

A front-end (`ModelPlan`, `ListPlan`, `writes`) makes a `Resolved`: named destinations and sources, and
the writes between views of them. A `Plan` proves that the writes do not meet, hands them to the active
backend, which keeps them as ready tasks, and remembers what has to be true for them to run again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from . import backend
from .compiling import between_graphs
from .conflicts import find_conflicts
from .destinations import Destination
from .errors import Finding, PlanError
from .execution import execute
from .fills import Constant
from .interrupts import shielded
from .judge import (
    Slot,
    conflict_finding,
    conversion_findings,
    slots_of,
    summary_of,
    verify_in_order,
)
from .report import Report, Summary
from .resolve import Resolved, plan_error
from .sources.lazy import Lazy
from .stream import STAGING_BYTES, Streamed
from .swap import Exchange
from .typing import (
    NewSource,
    Progress,
)

__all__ = ["Plan", "Undo"]

Undo = Callable[[], object]

_entering = threading.Lock()  # held for moments


class _Use:
    """One call of a plan.

    No lock, since an interrupt may come between taking a lock and the `try` that gives it back. Setting `over` in
    a `finally` is one instruction.
    """

    over = False


def _in_child() -> None:
    """Calls of another process, whose threads are not there, are of another type, and none gives the lock back."""
    global _Use, _entering
    _Use = type("_Use", (_Use,), {})  # type: ignore[misc, assignment]
    _entering = threading.Lock()


os.register_at_fork(after_in_child=_in_child)


class Plan:
    """Checked writes, ready to run. Made by `paramkit.plan`, `paramkit.writes`; not by its own name.

    A plan holds its destinations and sources strongly until `release()`. It acts under an implicit
    `no_grad`, except one made of two lists, which treats autograd as `Tensor.copy_` does.

    It refuses to run when what it was made for is no longer there: a parameter of the model that was
    replaced, or whose memory moved or changed its shape. `refresh()` resolves the names again.

    It is for one call at a time: another that comes meanwhile, from another thread or from a `progress`
    callback, raises PlanError.

    >>> import torch, paramkit
    >>> model, trained = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> plan = paramkit.plan(model, trained)
    >>> report = plan.apply()
    >>> report.summary.names, report.summary.bytes
    (('weight', 'bias'), 36)
    >>> plan.verify()
    []
    """

    _follow_autograd = False
    _follow_failures = False  # a failure half way is told from the names

    def __init__(self) -> None:
        self._compiled: Any = None
        self._summary = Summary()
        self._slots: list[Slot] = []
        self._slot_names: list[str] = []
        self._dst_names: list[str] = []
        self._src_names: list[str] = []
        self._write_dst: list[str] = []
        self._inference: list[str] = []
        self._use: _Use | None = None  # the call that this plan is in, or was in last
        self._claims = (
            False  # whether more than one call of the backend has to be kept from other threads
        )
        self._exchange: Exchange | None = None  # while a source is swapped in
        self._allocated: list[Destination] = []  # memory that is not in the model yet
        self._ordered = False
        self._in_module = False
        self._table: Mapping[str, Any] | None = None  # destinations of a mapping that is no dict
        self._shards: list[tuple[str, Any, Tensor]] = []  # name, DTensor, its local tensor

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
        self,
        resolved: Resolved,
        *,
        overlap: str = "error",
        table: Mapping[str, Any] | None = None,
        staging: int = STAGING_BYTES,
    ) -> None:
        """Check the writes against each other and hand them to the backend.

        `table`: the mapping that the destinations are values of, where there is no module.
        `staging`: bytes for sources that are not in memory.
        """
        findings = conversion_findings(resolved)
        conflicts = find_conflicts(resolved)
        ordered = overlap == "last" and any(c.kind == "write" for c in conflicts)
        for c in conflicts:
            if c.kind == "write" and overlap == "last" and c.first != c.second:
                continue
            findings.append(conflict_finding(resolved, c.kind, c.first, c.second))
        if findings:
            raise plan_error(findings)
        used = sorted({w.dst for w in resolved.writes})
        number = {d: k for k, d in enumerate(used)}
        destinations = [resolved.destinations[d] for d in used]
        slots, slot_names = slots_of(destinations, table if isinstance(table, dict) else None)
        active = backend.active()
        dsts = [d.tensor for d in destinations]
        srcs = [s.beside() if isinstance(s, Constant) else s for s in resolved.source_tensors]
        if any(isinstance(s, Lazy) for s in srcs):
            own = [replace(w, dst=number[w.dst]) for w in resolved.writes]
            compiled: Any = Streamed(active, dsts, srcs, own, slots, staging)
        else:
            writes = [w.plain(number[w.dst], w.src) for w in resolved.writes]
            compiled = active.Plan(dsts, srcs, writes, slots, self._follow_autograd, ordered)
        self._compiled, self._slots, self._slot_names = compiled, slots, slot_names
        self._table = None if isinstance(table, dict) else table
        self._ordered = ordered
        self._in_module = any(d.owner is not None for d in destinations)
        self._inference = [d.name for d in destinations if d.tensor.is_inference()]
        self._dst_names = [d.name for d in destinations]
        self._shards = [
            (d.name, d.wrapper, d.tensor) for d in destinations if d.wrapper is not None
        ]
        self._src_names = list(resolved.source_names)
        self._write_dst = [resolved.destinations[w.dst].name for w in resolved.writes]
        self._summary = summary_of(resolved, self._dst_names, compiled.families(), active.NAME)
        self._claims = isinstance(compiled, Streamed) or self._asks_values(resolved)

    # --- public ---

    def apply(
        self,
        source: NewSource | None = None,
        *,
        atomic: bool = False,
        progress: Progress | None = None,
    ) -> Report:
        """Write.

        Args:
            source: a new source of the same names, shapes and dtypes, used from now on (the plan holds
                it instead of the old one); a changed memory layout is planned anew. None: the source
                in use.
            atomic: where something fails that shows only while writing (a read error, a device out of
                memory, an interrupt), put back what was there. Takes as much memory as was written.
            progress: called now and then with (bytes written, bytes in all).

        Returns:
            What was written, and how fast.

        Raises:
            PlanError: a destination or source is not what the plan was made for, or `source` differs
                in a name, shape or dtype. Nothing was written.
            TornError: writing failed half way, without `atomic`; `paramkit.torn(model)` says what holds
                the new values and what does not.
            RuntimeError: a plan of lists, where `Tensor.copy_` would raise (a leaf that requires grad);
                inference tensors outside of `torch.inference_mode()`.
            TypeError: a source for a plan of recorded writes, which has its values.

        >>> import torch, paramkit
        >>> model = {"w": torch.zeros(2)}
        >>> plan = paramkit.plan(model, {"w": torch.ones(2)})
        >>> _ = plan.apply()
        >>> _ = plan.apply({"w": torch.full((2,), 3.0)}, atomic=True)
        >>> model["w"]
        tensor([3., 3.])
        """
        if torch.compiler.is_dynamo_compiling():
            run = between_graphs(Plan.apply, "Plan.apply")
            return run(self, source, atomic=atomic, progress=progress)
        if progress is not None and not callable(progress):
            raise TypeError(f"apply: progress must be callable, got {type(progress).__name__}")
        use = _Use()
        try:
            self._enter(use)
            undo = None if source is None else self._undo(source)
            compiled = self._take(source)
            if self._claims or atomic or progress is not None:
                # A single call of the backend needs none: it claims what it writes by itself.
                with compiled.claim():
                    return self._apply(compiled, undo, progress, atomic)
            return self._apply(compiled, undo, progress, atomic)
        finally:
            use.over = True

    def _apply(
        self, compiled: Any, undo: Undo | None, progress: Progress | None, atomic: bool
    ) -> Report:
        self._check(compiled, undo)
        start = perf_counter()
        if self._replaced_in_table() or not self._execute(compiled, progress, atomic):
            raise self._stale()
        return Report(self._summary, perf_counter() - start)

    def _check(self, compiled: Any, undo: Undo | None) -> None:
        """What is asked of the values. A refused source is not kept."""
        try:
            if self._inference:
                self._check_inference()
            self._check_values(compiled)
        except BaseException:
            if undo is not None:
                undo()
            raise

    def _undo(self, source: Any) -> Callable[[], object]:
        """How to go back to the source in use now."""
        return lambda: None

    def _execute(self, compiled: Any, progress: Progress | None, atomic: bool) -> bool:
        if self._shards:
            self._bump_shards()
        if not self._follow_failures and not atomic:
            return bool(compiled.run(progress))
        model = self._target()
        return execute(
            compiled,
            self._dst_names,
            self._write_dst,
            model,
            progress=progress,
            atomic=atomic,
            apart=[d.name for d in self._allocated],
        )

    def _bump_shards(self) -> None:
        """What autograd saved is the DTensor: its version counts, beside that of its local tensor."""
        torch.autograd.graph.increment_version([w for _, w, _ in self._shards])

    def _check_inference(self) -> None:
        if not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"apply: {', '.join(self._inference)}: Inplace update to inference tensor outside InferenceMode "
                "is not allowed; nothing was written: write inside torch.inference_mode()"
            )

    def _target(self) -> Any:
        """The model, where there is one."""
        return None

    def _asks_values(self, resolved: Resolved) -> bool:
        """Whether `_check_values` looks at them."""
        return False

    def _check_values(self, compiled: Any) -> None:
        """Raise if the sources' values are such that nothing should be written."""

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
        """The plan as a table, layers of one kind folded into one row.

        Returns:
            Text as wide as the terminal, or 120 columns: the writes, how many bytes they are, which
            kernels run them, and what is converted, kept and dropped.

        Raises:
            PlanError: the plan was released.

        >>> import torch, paramkit
        >>> plan = paramkit.plan({"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 3)})
        >>> print(plan.explain())  # doctest: +ELLIPSIS
        destination  source    shape   dtype    how
        w            the same  (2, 3)  float32  whole
        <BLANKLINE>
        1 write into 1 of 1 tensors, 6 elements, 24 bytes
        ...
        """
        from .explain import explain

        families = self._ready().families()
        return explain(self._explainable(), dict(enumerate(families)))

    def verify(self, source: NewSource | None = None) -> list[str]:
        """The names of destinations whose bits are not what `apply()` writes; empty when all are.

        After a cast, any NaN counts as equal to any NaN. Nothing is written.

        Args:
            source: as for `apply`.

        Returns:
            The names that differ, each once, in the order of the plan.

        Raises:
            PlanError: as `apply`.

        >>> import torch, paramkit
        >>> model = {"a": torch.zeros(2), "b": torch.zeros(2)}
        >>> paramkit.plan(model, {"a": torch.zeros(2), "b": -torch.zeros(2)}).verify()
        ['b']
        """
        if torch.compiler.is_dynamo_compiling():
            return between_graphs(Plan.verify, "Plan.verify")(self, source)
        use = _Use()
        try:
            self._enter(use)
            compiled = self._take(source)
            with compiled.claim("compare"):
                if self._is_stale():
                    raise self._stale()
                differ = verify_in_order(compiled) if self._ordered else compiled.verify()
        finally:
            use.over = True
        return list(dict.fromkeys(self._write_dst[i] for i in differ))

    def swapped(self, source: NewSource | None = None) -> AbstractContextManager[Report]:
        """Put a source in for the length of a block, and every bit back at its end, whatever happens in it.

        For evaluating averaged weights, or an adapter. Where sources and destinations match one to one,
        in dtype too, they are exchanged in place, through a small buffer: the source holds the model's
        values meanwhile, and what the block writes into the model is the source's afterwards (call `eval()`
        first where there is a batch norm). Otherwise (a conversion, a file, a source that is read twice) a
        copy is kept of what is overwritten.

        Args:
            source: as for `apply`.

        Returns:
            A context manager; what it gives is the report of putting the source in.

        Raises:
            PlanError: as `apply`; also where this plan is swapped in already, and at the end where a
                parameter was replaced meanwhile.

        >>> import torch, paramkit
        >>> model, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> plan = paramkit.plan(model, average)
        >>> before = model.weight.tolist()
        >>> with plan.swapped():
        ...     inside = model.weight.tolist()
        >>> inside == before, model.weight.tolist() == before
        (False, True)
        """
        return _Swapped(self._swapped(source))

    def _swapped(self, source: NewSource | None) -> Generator[Report, None, None]:
        use = _Use()
        try:
            self._enter(use)
            undo = None if source is None else self._undo(source)
            compiled = self._take(source)
            exchange = Exchange(compiled, self._explainable(), self._exchangeable)
        except BaseException:
            use.over = True
            raise
        try:
            try:
                with exchange.claim():
                    self._check(compiled, undo)
                    if self._is_stale():
                        raise self._stale()
                    self._exchange = exchange
                    start = perf_counter()
                    self._bump_shards()
                    if not exchange.enter():
                        raise self._stale()
            finally:
                use.over = True
            yield Report(self._summary, perf_counter() - start)
        finally:
            use.over = True
            stale: PlanError | None = None
            lost: list[int] = []

            def back() -> None:
                nonlocal stale
                if self._exchange is not exchange:
                    return  # it is back; another thread may have swapped its source in meanwhile
                stale = self._stale() if self._is_stale() else None
                self._bump_shards()
                lost.extend(exchange.leave())
                self._exchange = None

            try:
                back()
            finally:  # see NOTE: [Interrupts]
                try:
                    back()
                finally:
                    shielded(back)
            if stale is not None:
                names = ", ".join(dict.fromkeys(self._write_dst[w] for w in lost))
                lost_text = (
                    f"; of {names} the memory is gone, and nothing was put back" if lost else ""
                )
                raise PlanError(
                    "a tensor was replaced or moved while the source was swapped in; what the plan holds was put "
                    f"back, what is in the model now was not{lost_text}.",
                    stale.findings,
                )

    def refresh(self, source: NewSource | None = None) -> None:
        """Resolve the names again: after a parameter was replaced, moved or resized, or `release()`.

        Args:
            source: a new source; None keeps the one in use. Needed after `release()`.

        Raises:
            PlanError: what the names stand for now does not fit. The plan stays as it was.
            SourceError: the new source cannot be read.
            TypeError: a source for a plan of recorded writes, which has its values.

        >>> import torch, paramkit
        >>> model, trained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> plan = paramkit.plan(model, trained)
        >>> model.weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> plan.refresh()
        >>> _ = plan.apply()
        >>> torch.equal(model.weight, trained.weight)
        True
        """
        if torch.compiler.is_dynamo_compiling():
            return between_graphs(Plan.refresh, "Plan.refresh")(self, source)
        use = _Use()
        try:
            self._enter(use)
            self._build(source)
        finally:
            use.over = True

    def release(self) -> None:
        """Let go of every tensor. `refresh(source)` makes a plan with names usable again.

        Raises:
            PlanError: inside `swapped`.

        >>> import torch, paramkit
        >>> plan = paramkit.plan(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> plan.release()
        >>> plan
        <ModelPlan, released>
        """
        if self._exchange is not None:
            raise self._is_swapped()
        self._compiled = None
        self._slots, self._slot_names, self._shards = [], [], []

    def set_requires_grad(self, requires_grad: bool) -> None:
        """Set `requires_grad` on every floating-point or complex parameter that this plan writes.

        Buffers of a module stay as they are; of a mapping or a list every tensor counts.

        Args:
            requires_grad: False freezes them.

        Raises:
            PlanError: False, and one of them is not a leaf; the plan was released.
            TypeError: something that is neither True nor False.

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
        shards = {name: wrapper for name, wrapper, _ in self._shards}
        chosen = {
            name: tensor
            for name, tensor in ((name, shards.get(name, local)) for name, local in named)
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

    @property
    def _exchangeable(self) -> bool:
        """Whether the source is the user's own memory, to be written."""
        return True

    @staticmethod
    def _is_swapped() -> PlanError:
        return PlanError(
            "the source of this plan is swapped in; leave the block of plan.swapped() first. "
            "Nothing was written."
        )

    def _enter(self, use: _Use) -> None:
        """One call at a time: the GIL is given up while a long plan runs."""
        with _entering:
            last = self._use
            if last is not None and not last.over and type(last) is _Use:
                raise PlanError(
                    "this plan is in use already, by another thread or the call that it is in; "
                    "nothing was written."
                )
            self._use = use
        if self._exchange is not None:
            raise self._is_swapped()

    def _ready(self) -> Any:
        if self._compiled is None:
            raise PlanError("this plan was released; refresh(source) resolves its names again.")
        return self._compiled

    def _is_stale(self) -> bool:
        return any(self._compiled.moved()) or bool(
            self._compiled.replaced() or self._replaced_in_table()
        )

    def _replaced_in_table(self) -> list[str]:
        """Names of what is another object now where the backend cannot see it.

        Values of a mapping that is no dict, and the local tensors of DTensors.
        """
        gone: list[str] = []
        if self._shards:
            gone = [n for n, wrapper, local in self._shards if wrapper._local_tensor is not local]
        if self._table is None:
            return gone
        seen = {name: wrapper for name, wrapper, _ in self._shards}
        held = zip(self._dst_names, self._compiled.destinations(), strict=True)
        return gone + [
            name for name, tensor in held if self._table.get(name) is not seen.get(name, tensor)
        ]

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

    def __reduce__(self) -> Any:
        raise TypeError(
            "a plan holds addresses, and cannot be pickled or copied: make one where it is to run"
        )

    def __repr__(self) -> str:
        if self._compiled is None:
            return f"<{type(self).__name__.lstrip('_')}, released>"
        s = self._summary
        return f"<paramkit.Plan: {s.writes} writes into {len(s.names)} tensors, {s.bytes} bytes, backend {s.backend}>"


class _Swapped(AbstractContextManager[Report]):
    """The block of `Plan.swapped`, each end of which is outside of compiled graphs.

    Only an interrupt at the very beginning of `__exit__` is before what puts the source back. That happens then when
    nobody holds the block any more: when its exception has been dealt with.
    """

    def __init__(self, block: Generator[Report, None, None]) -> None:
        self._block = block
        self._entered = False

    def __enter__(self) -> Report:
        if torch.compiler.is_dynamo_compiling():
            return between_graphs(_Swapped.__enter__, "Plan.swapped")(self)
        if self._entered:
            raise RuntimeError("this block was entered before: call plan.swapped() for another one")
        try:
            self._entered = True
            return next(self._block)
        except BaseException:
            self._block.close()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            compiling = torch.compiler.is_dynamo_compiling()
        except BaseException:
            self._block.close()
            raise
        if compiling:
            return between_graphs(_Swapped.__exit__, "Plan.swapped")(self, *error)
        if not self._entered:
            raise RuntimeError("this block was not entered: with plan.swapped(): ...")
        next(self._block, None)
        return None
