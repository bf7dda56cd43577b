"""`writes`: slice assignments recorded by name, checked together, and done in one fused pass.

What is here is complete, and says everything that can be wrong. The compiled backend has a `Recorder`
that takes the plain case out of its hands, names, indices, checks and the pass: it records until it meets
something that is not plain, writes at the end if it is sure, and hands all it recorded to Python otherwise.
"""

from __future__ import annotations

import weakref
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backend
from .backend import checks
from .compiling import between_graphs
from .conflicts import find_conflicts
from .destinations import Destination, destinations_of, layout_finding, named_destinations
from .errors import Finding, PlanError, UnknownNameError, suggest
from .fills import beside
from .judge import conflict_finding
from .lists import NUMBERS
from .localize import localize
from .plan import Plan
from .resolve import Resolved, Write, plan_error
from .sharding import is_sharded, spread_of
from .sources.spread import Spread
from .typing import Index, Model, Number, Overlap

__all__ = ["Handle", "Writes", "writes"]


def writes(model: Model, *, overlap: Overlap = "error") -> Writes:
    """Record slice assignments to a model's tensors; write them all on leaving the `with` block.

    `w[name][index] = value` and `w[parameter][index] = value` mean what `tensor[index] = value` means
    in torch, for basic indices: integers, slices, `None`, `...`. Nothing is written before the block
    ends, and nothing at all if the block or a check raises. No autograd: it acts under `no_grad`.

    Args:
        model: a module (its parameters and persistent buffers), or a mapping from names to tensors.
        overlap: "error": two writes of one element are refused. "last": the later one wins.

    Returns:
        A context manager; its `plan` is the `Plan` of these writes, once the block has ended. It is worked
        out when it is first asked for, from the values that were recorded and from the model as it is
        then: it has other memory of a parameter, but not another parameter, which it refuses to write
        until `plan.refresh()`. What does not fit any more raises PlanError there.

    Raises:
        PlanError: at the end of the block, with everything that is wrong.
        UnknownNameError: a name or tensor that the model does not have (also a KeyError).

    >>> import torch, paramkit
    >>> conv = torch.nn.Conv2d(1, 1, 3)
    >>> with paramkit.writes(conv) as w:
    ...     w["weight"][0, 0, 0, 0] = 1.0
    ...     w["weight"][:, :, 1:2, 1:2] = 0.5
    ...     w[conv.bias][...] = torch.zeros(1)
    >>> conv.weight[0, 0, 0, 0].item(), conv.weight[0, 0, 1, 1].item()
    (1.0, 0.5)
    """
    if torch.compiler.is_dynamo_compiling():
        return between_graphs(writes, "writes")(model, overlap=overlap)
    recorder = getattr(backend.active(), "Recorder", None)
    if recorder is None:
        return Writes(model, overlap)
    if recorder not in _compiled:
        Handle.register(backend.active().Handle)
        _compiled[recorder] = type("Writes", (recorder, Writes), {"__module__": __name__})
    return _compiled[recorder](model, overlap)


# `Writes` whose plain assignments a compiled recorder takes, by the type of the recorder.
_compiled: dict[type, type[Writes]] = {}


@dataclass(frozen=True)
class _Recorded:
    name: str
    index: Any
    value: Tensor  # what is copied: the user's tensor, or a number made a 0-dim tensor
    version: int | None  # of the user's tensor when it was recorded
    text: str


class Writes:
    """The recorder that `paramkit.writes` returns."""

    def __init__(self, model: Model, overlap: Overlap) -> None:
        if overlap not in ("error", "last"):
            raise ValueError(f'writes: overlap must be "error" or "last", got {overlap!r}')
        self._model = model
        self._overlap = overlap
        self._recorded: list[_Recorded] = []
        self._state = "new"
        self._numbers: dict[Any, Tensor] = {}
        self._plan: Plan | None = None
        self._planned: dict[str, Tensor] | None = None  # where the plan is still to be made
        self._direct = False  # whether the compiled recorder wrote, for tests of the route
        self._known = self._open(model, isinstance(model, nn.Module))
        if not self._known:
            _ = self._names  # says what is wrong with the model

    # --- what a compiled recorder does instead: see csrc/torch/recorder.cpp ---

    _fast = False  # whether it is at it

    def _open(self, model: Any, is_module: bool) -> bool:
        """Whether it can look up the names of this model."""
        return False

    def _run(self) -> bool:
        """Check and write what it recorded. False, and nothing written, if that is for Python to do."""
        return False

    def _take(self) -> list[tuple[str, Any, Tensor, int | None]]:
        """Hand over what it recorded, and record no more."""
        return []

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors that it knows, among them all that it wrote."""
        return {}

    # --- public ---

    @property
    def plan(self) -> Plan | None:
        """After the block, the plan of its writes; `plan.apply()` writes again."""
        if self._planned is not None:
            self._take_over()
            self._plan = _WritesPlan(self._model, self._recorded, self._overlap, self._planned)
            self._planned = None
        return self._plan

    def __enter__(self) -> Writes:
        if self._state != "new":
            raise PlanError(
                "this writes() block was used already; call paramkit.writes(model) again."
            )
        self._state = "open"
        self._fast = self._known
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            return between_graphs(Writes.__exit__, "writes")(self, kind, error, trace)
        self._state = "closed"
        fast, self._fast = self._fast, False
        if kind is not None:
            self._take()
            self._recorded.clear()
            return
        if fast and self._run():
            self._direct = True
            self._planned = self._tensors()
            return
        self._take_over()
        changed = [
            Finding(
                r.text,
                "changed",
                "a value that was changed after it was recorded",
                "",
                "record a clone()",
            )
            for r in self._recorded
            if r.version is not None and r.value._version != r.version
        ]
        if changed:
            raise PlanError(
                "values were changed before the block ended; nothing was written.", changed
            )
        made = _WritesPlan(self._model, self._recorded, self._overlap)
        made.apply()
        self._plan = made

    def __getitem__(self, key: str | Tensor) -> Handle:
        return _Handle(self, self._find(key))

    if not TYPE_CHECKING:  # so that a type checker refuses it too

        def __setitem__(self, key: object, value: object) -> None:
            raise TypeError(
                "writes: assign to a slice of the handle: w[name][...] = value, not w[name] = value"
            )

    # --- recording ---

    @cached_property
    def _names(self) -> dict[str, Tensor]:
        return {d.name: d.tensor for d in named_destinations(self._model)}

    @cached_property
    def _ids(self) -> dict[int, str]:
        # Tied weights may be two objects; each is a key.
        ids: dict[int, str] = {}
        for name, tensor in self._names.items():
            ids.setdefault(id(tensor), name)
        return ids

    def _find(self, key: str | Tensor) -> str:
        """The name that a key stands for."""
        if isinstance(key, Tensor):
            name = self._ids.get(id(key))
            if name is None:
                raise UnknownNameError(
                    f"writes: a tensor of shape {tuple(key.shape)} is not one of the model's; "
                    "pass the parameter itself (not a view or .data of it), or its name",
                    [],
                )
            return name
        if key not in self._names:
            near = suggest(str(key), self._names)
            hint = f"did you mean {near}?" if near else "the names are those of model.state_dict()"
            raise UnknownNameError(
                "writes: the model has no such tensor; nothing was written.",
                [Finding(str(key), "unknown", hint=hint)],
            )
        return key

    def _take_over(self) -> None:
        self._recorded += [
            _Recorded(name, index, value, version, _text(name, index))
            for name, index, value, version in self._take()
        ]

    def _assign(self, name: str, index: Any, value: Any) -> None:
        if isinstance(value, Handle):
            raise TypeError("writes: a handle cannot be read; assign a tensor or a number")
        recorded = self._record(name, _checked_index(name, index), value)
        self._take_over()
        self._recorded.append(recorded)

    def _record(self, name: str, index: Any, value: Any) -> _Recorded:
        if self._state != "open":
            raise PlanError("writes: this block has ended; nothing more can be recorded in it.")
        text = _text(name, index)
        if isinstance(value, Tensor):
            return _Recorded(name, index, value, _version(value), text)
        if not isinstance(value, NUMBERS):
            raise TypeError(
                f"writes: {text} = {type(value).__name__}: expected a number or a tensor"
            )
        dtype, device = self._names[name].dtype, self._names[name].device
        # Equal numbers share an element; -0.0 equals 0.0, and True equals 1, hence the repr and the type.
        key = (type(value), repr(value), dtype, device)
        one = self._numbers.get(key)
        if one is None:
            try:
                # torch's own conversion of a number in a slice assignment, and its own error.
                one = torch.empty((), dtype=dtype)
                one[...] = value  # type: ignore[assignment]
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise type(error)(f"writes: {text} = {value!r} of {dtype}: {error}") from None
            one = self._numbers[key] = beside(one, self._names[name])
        return _Recorded(name, index, one, None, text)

    def _refuse_read(self, name: str, index: Any) -> Any:
        raise TypeError(
            f"writes: {_text(name, index)} was read (as `+=` does), but a recorded tensor can "
            "only be assigned; compute the value first, from the parameter itself"
        )


class Handle(metaclass=ABCMeta):  # noqa: B024  the compiled recorder's handle is registered as one
    """A tensor of the model, for recording slice assignments; it cannot be read."""

    __slots__ = ()

    def __setitem__(self, index: Index, value: Tensor | Number) -> None:
        raise NotImplementedError

    if not TYPE_CHECKING:  # so that a type checker refuses to read one, and `+=`

        def __getitem__(self, index: Index) -> Any:
            raise NotImplementedError


class _Handle(Handle):
    __slots__ = ("_name", "_writes")

    def __init__(self, owner: Writes, name: str) -> None:
        self._writes = owner
        self._name = name

    def __setitem__(self, index: Index, value: Tensor | Number) -> None:
        self._writes._assign(self._name, index, value)

    def __getitem__(self, index: Any) -> Any:
        return self._writes._refuse_read(self._name, index)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("'Handle' object doesn't support item deletion")

    def __repr__(self) -> str:
        return f"<handle of {self._name}, for assignments only>"


class _WritesPlan(Plan):
    """Recorded assignments; refresh() resolves the names and indices again."""

    def __init__(
        self,
        model: Any,
        recorded: list[_Recorded],
        overlap: Overlap,
        planned: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`planned`: the tensors that were written already; others of these names are refused."""
        super().__init__()
        self._model: Callable[[], Any] = (
            weakref.ref(model) if isinstance(model, nn.Module) else lambda: model
        )
        self._recorded = tuple(recorded)
        self._overlap = overlap
        self._resolved = Resolved()
        self._replaced: list[str] = []
        self._build(None)
        if planned is not None:
            now = {d.name: d.tensor for d in named_destinations(model)}
            names = dict.fromkeys(r.name for r in recorded)
            self._replaced = [name for name in names if now[name] is not planned[name]]

    def _build(self, source: Any) -> None:
        if source is not None:
            raise TypeError(
                "a plan of recorded writes has the values that were recorded; it takes no source"
            )
        model = self._model()
        if model is None:
            raise PlanError("the model of this plan no longer exists.")
        resolved = _resolve_recorded(destinations_of(model), self._recorded)
        if self._overlap == "error":
            _check_overlaps(resolved)
        resolved = localize(resolved)
        self._compile(
            resolved, overlap=self._overlap, table=None if isinstance(model, nn.Module) else model
        )
        for d in resolved.destinations:  # the plan holds tensors, not the modules that own them
            d.owner, d.path, d.alias_places = None, (), ()
        self._resolved = resolved
        self._replaced = []

    def _replaced_in_table(self) -> list[str]:
        return [*super()._replaced_in_table(), *self._replaced]

    def _rebind(self, source: Any) -> None:
        raise TypeError(
            "a plan of recorded writes has the values that were recorded; it takes no source"
        )

    def _explainable(self) -> Resolved:
        return self._resolved

    def release(self) -> None:
        super().release()
        self._resolved = Resolved()


def _resolve_recorded(destinations: list[Destination], recorded: tuple[_Recorded, ...]) -> Resolved:
    index = {name: k for k, d in enumerate(destinations) for name in (d.name, *d.aliases)}
    resolved = Resolved(destinations=destinations)
    findings: list[Finding] = []
    for r in recorded:
        if r.name not in index:
            findings.append(Finding(r.name, "missing", "", "a tensor of the model"))
            continue
        d = destinations[index[r.name]]
        if is_sharded(d.tensor):
            d.tensor = spread_of(d.tensor)
        dst = d.tensor
        given = spread_of(r.value) if is_sharded(r.value) else r.value.detach()
        finding = layout_finding(r.name, dst, True) or layout_finding(
            f"the value of {r.text}", given if isinstance(given, Spread) else r.value, False
        )
        if finding is not None:
            findings.append(finding)
            continue
        try:
            whole = _whole_of(dst)
            view = whole[r.index]
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            findings.append(
                Finding(r.text, "index", str(error), f"an index into shape {tuple(dst.shape)}")
            )
            continue
        value = _without_leading_ones(_whole_of(given), view.dim())
        if checks.broadcast_error(view.shape, value.shape):
            findings.append(
                Finding(
                    r.text,
                    "shape",
                    f"a value of shape {tuple(r.value.shape)}",
                    f"one that broadcasts to {tuple(view.shape)}",
                )
            )
            continue
        source = value.expand(view.shape)
        offset = int(view.storage_offset() - whole.storage_offset())
        resolved.writes.append(
            Write(
                index[r.name],
                len(resolved.source_tensors),
                tuple(view.shape),
                view.stride(),
                offset,
                source.stride(),
                0,
                r.text,
            )
        )
        resolved.source_names.append(f"value of {r.text}")
        resolved.source_tensors.append(given if isinstance(given, Spread) else r.value)
    if findings:
        n = len(findings)
        raise PlanError(
            f"the writes have {n} {'problem' if n == 1 else 'problems'}; nothing was written.",
            findings,
        )
    return resolved


def _check_overlaps(resolved: Resolved) -> None:
    """Raise where two writes of a tensor in parts meet, whoever holds the element: so all ranks do."""
    if not any(isinstance(d.tensor, Spread) for d in resolved.destinations):
        return
    whole = replace(
        resolved,
        destinations=[replace(d, tensor=_whole_of(d.tensor)) for d in resolved.destinations],
        source_tensors=[None] * len(resolved.source_tensors),  # what is read is looked at later
    )
    met = [c for c in find_conflicts(whole) if c.kind == "write"]
    if met:
        raise plan_error([conflict_finding(resolved, c.kind, c.first, c.second) for c in met])


def _whole_of(dst: Any) -> Tensor:
    """A destination to take views of: of a tensor in parts the whole, without memory."""
    if isinstance(dst, Spread):
        return torch.empty(dst.shape, dtype=dst.dtype, device="meta")
    whole: Tensor = dst.detach()
    return whole


def _without_leading_ones(value: Tensor, rank: int) -> Tensor:
    """As torch's slice assignment: a value may have more dimensions than the slice if they are of size 1."""
    while value.dim() > rank and value.shape[0] == 1:
        value = value[0]
    return value


def _checked_index(name: str, index: Any) -> Any:
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, bool) or not (
            item is None or item is Ellipsis or isinstance(item, (int, slice))
        ):
            raise TypeError(
                f"writes: {name}[{_index_text(index)}]: expected integers, slices, None or ..., got "
                f"{type(item).__name__}; for an index tensor or mask assign to the parameter itself, "
                "under torch.no_grad()"
            )
    return index


def _text(name: str, index: Any) -> str:
    return f"{name}[{_index_text(index)}]"


def _index_text(index: Any) -> str:
    def one(item: Any) -> str:
        if isinstance(item, slice):
            parts = ["" if p is None else str(p) for p in (item.start, item.stop)]
            return ":".join(parts) + (f":{item.step}" if item.step is not None else "")
        if item is Ellipsis:
            return "..."
        return f"<{type(item).__name__}>" if isinstance(item, Tensor) else str(item)

    return ", ".join(one(i) for i in index) if isinstance(index, tuple) else one(index)


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version
