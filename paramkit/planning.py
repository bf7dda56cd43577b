"""`plan`: every write of a job worked out and checked once, to be performed again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .compiling import between_graphs
from .list_plan import ListPlan
from .model_plan import ModelPlan
from .options import Options
from .plan import Plan
from .typing import (
    Casting,
    Hooks,
    Model,
    Overflow,
    Rules,
    Source,
    Values,
)

__all__ = ["plan"]


@overload
def plan(
    model: Model,
    source: Source,
    rules: Rules = (),
    *,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    casting: Casting = "same_kind",
    overflow: Overflow = "ignore",
    hooks: Hooks = "refuse",
    mmap: bool = False,
    staging: int | None = None,
) -> Plan: ...
@overload
def plan(model: Sequence[Tensor], source: Values) -> Plan: ...
def plan(
    model: Model | Sequence[Tensor],
    source: Any,
    rules: Rules = (),
    *,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    casting: Casting = "same_kind",
    overflow: Overflow = "ignore",
    hooks: Hooks = "refuse",
    mmap: bool = False,
    staging: int | None = None,
) -> Plan:
    """Work out and prove every write of a transplant, or of a list of copies; write nothing yet.

    Args:
        model: what is written: a module (its parameters and persistent buffers, other buffers where they
            are named), a mapping from names to tensors, or a list of n tensors of any shape, dtype and
            strides.
        source: for a module or mapping: whatever `paramkit.open_source` takes: a module, a mapping, a
            checkpoint file or folder. Of files only the headers are read now. For a list: a list of n
            tensors (each broadcasts to its destination) or numbers, or one number.
        rules: how source names and axes map to destinations, or the path of a rule file; not for lists.
        identity: names that no rule touches map to themselves.
        allow_missing: destination names that may stay unwritten: exact, with `{i}`, or with `*`.
        allow_unexpected: source names that may stay unread: the same.
        casting: which conversions are allowed, with numpy's meaning: "no", "safe" (every value is kept),
            "same_kind" (within floats, or within integers, or to a wider kind), "unsafe". The report lists
            every conversion.
        overflow: "error" looks for finite values that the destination's dtype cannot hold, before each
            `apply`, before anything is written. In whole sources, also where another rank has the shard.
        hooks: "refuse" modules that load a state dict in a way of their own, or "ignore" their hooks.
        mmap: map files into memory instead of reading them. Faster for a local file that nobody changes;
            one that is cut meanwhile ends the process (SIGBUS).
        staging: bytes of the buffer that files are read through where they are rearranged or converted, and of
            one read.

    Returns:
        A `Plan`; its `apply()` writes.

    Raises:
        PlanError: with everything that is wrong, at once.
        SourceError: the source cannot be read.
        TypeError, ValueError: an argument of the wrong type or value.

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
        plain = (casting, overflow, hooks, mmap, staging) == (
            "same_kind",
            "ignore",
            "refuse",
            False,
            None,
        )
        if rules or not identity or allow_missing or allow_unexpected or not plain:
            raise TypeError(
                "plan: rules, identity, allow_missing, allow_unexpected, casting, overflow, hooks, mmap and "
                "staging are for a model or a mapping with names; two lists are matched by position and "
                "converted as Tensor.copy_ does"
            )
        return _made(ListPlan, model, source)
    options = Options.make(
        rules,
        allow_missing,
        allow_unexpected,
        staging,
        identity=identity,
        casting=casting,
        overflow=overflow,
        hooks=hooks,
        mmap=mmap,
    )
    return _made(ModelPlan, model, source, options)


def _made(kind: Callable[..., Plan], *arguments: Any) -> Plan:
    if torch.compiler.is_dynamo_compiling():
        return between_graphs(lambda: kind(*arguments), "plan")()
    return kind(*arguments)
